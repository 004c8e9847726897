"""Ends a stage at one of its writes, as a kill would: nothing after that write is written any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from clip_batch.storage.store import Store

WRITES = ("create", "replace", "adopt", "rename", "remove", "remove_folder")
"""The operations of a store that change it."""


class Death(BaseException):
    """Stands for SIGKILL: no handler of errors catches it."""


@contextmanager
def death(write: int | None) -> Iterator[None]:
    """Let all writes to stores succeed up to the one of that number, from 0, and none from then on; None: all.

    A `Death` that leaves the block is the expected end of it; a block that has fewer writes ends as ever.
    """
    done = 0

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if write is not None and done > write:
                raise Death
            return operation(*arguments, **options)

        return operate

    patches = [patch.object(Store, name, dying(getattr(Store, name))) for name in WRITES]
    for one in patches:
        one.start()
    try:
        yield
    except Death:
        pass
    finally:
        for one in patches:
            one.stop()
