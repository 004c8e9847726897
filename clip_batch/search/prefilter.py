"""A condition looked up in all of an index's metadata before the search, so that rows are found that rarely meet it."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from clip_batch.search.backend import Backend
from clip_batch.search.conditions import Condition
from clip_batch.search.rows import RowSet

KEPT = 16
"""Sets of rows that are kept for later requests with the same condition."""


class Prefilter:
    """The rows of an opened index that meet conditions. Requests with the same condition wait for one look-up."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._lock = backend, Lock()
        self._kept: OrderedDict[str, RowSet] = OrderedDict()

    def select(self, condition: Condition) -> RowSet:
        """The rows of which the condition is true. Blocks: every value of its columns is read."""
        key = str(condition)  # not the condition itself: it is equal to one with 1.0 or true in place of 1
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._backend.select(self._backend.where(condition))
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]
