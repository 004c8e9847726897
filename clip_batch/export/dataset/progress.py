"""How far a pass over a dataset is: what the dataset counts, and what its loader tells it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from clip_batch.export.dataset.failures import Failures


class Passes(Protocol):
    """A dataset whose passes can be shared among workers and resumed; `FilteredDataset` is one."""

    def __len__(self) -> int: ...

    def state_dict(self) -> dict[str, Any]:
        """Where the pass stands."""

    def begin(self, workers: int) -> tuple[list[list[int]], list[int]]:
        """Begin a pass of so many workers: the phases that are over, and the one that `state_dict` tells of."""

    def read(self, over: list[list[int]], gone: list[int], worker: int, failures: Failures) -> Iterator[dict[str, Any]]:
        """The samples that are left to one worker of a pass; `gone` and `failures` are kept up to date."""

    def progress(self, worker: int, gone: int, following: int, failures: Failures) -> None:
        """What the loader learns from one of its workers: how far it is, who is next, what failed meanwhile."""

    def finish(self) -> None:
        """The loader's pass is over."""
