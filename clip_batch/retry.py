"""Trying again: what goes away by itself (a busy store, a reset connection, a timeout) is retried, nothing else."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar

from clip_batch.errors import ClipBatchError

T = TypeVar("T")

TRIES = 6
"""Calls in all, before an error that may pass counts as one that does not."""

LONGEST = 240.0
"""Seconds after which no other try begins: hdfs-native alone waits for three minutes for a dead NameNode."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0
"""Seconds: a pause is drawn from between half of 0.5, 1, 2, 4, ... and all of it, 20 at the most."""

_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ClipBatchError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    NotImplementedError,
    ImportError,
    AssertionError,
    MemoryError,
)
"""What a second call would only say again."""

_FINAL_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EINVAL, errno.ENOSYS, errno.ENAMETOOLONG}
"""Of this machine's disk, and s3fs's numbers for requests that are wrong in themselves."""


def transient(error: BaseException) -> bool:
    """True for what may go away: each store has errors of its own, so all but what is known to stay.

    HTTP errors carry their status: 408, 425, 429 and 5xx pass, the others stay. So do errors about
    credentials, whatever they derive from.
    """
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp"):
        assert cause is not None  # fsspec takes any answer but 200 for "not found"
        return transient(cause)
    if not isinstance(error, Exception) or isinstance(error, _FINAL) or "Credential" in type(error).__name__:
        return False
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 425, 429)
    return getattr(error, "errno", None) not in _FINAL_NUMBERS


def retried(call: Callable[[], T], what: str, wait: Callable[[float], object] = time.sleep) -> T:
    """What `call` returns, called up to TRIES times with growing random pauses between.

    An error that stays is raised as it is, at once. After the last try an OSError says `what`
    ("reading s3://bucket/a.tar") and what the store said, caused by the store's own error. `wait`
    takes the seconds of a pause, and may raise to end the waiting.
    """
    started = time.monotonic()
    for number in count(1):
        try:
            return call()
        except Exception as error:
            if not transient(error):
                raise
            if number == TRIES or time.monotonic() - started > LONGEST:
                said = " ".join(str(error).split()) or type(error).__name__
                raise OSError(f"{what}: {said} ({number} tries); run again once the store answers") from error
        wait(min(FIRST_PAUSE * 2 ** (number - 1), LONGEST_PAUSE) * random.uniform(0.5, 1))
    raise AssertionError  # count() does not end
