"""Evaluate a condition on all metadata of an index before a search, which then finds rows that rarely match."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from clip_batch.search.backend import Backend
from clip_batch.search.conditions import Condition
from clip_batch.search.rows import RowSet

CACHED = 16
"""Number of row sets that are cached for later requests with the same condition."""


class Prefilter:
    """Caches the rows of an open index that meet conditions. Concurrent requests evaluate a condition only once."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._lock = backend, Lock()
        self._cached: OrderedDict[str, RowSet] = OrderedDict()

    def select(self, condition: Condition) -> RowSet:
        """Return the rows for which the condition is true. Slow unless cached: all values of its columns are read."""
        key = str(condition)  # not the condition, which equals one with 1.0 or true in place of 1
        with self._lock:
            if key not in self._cached:
                self._cached[key] = self._backend.select(self._backend.where(condition))
            self._cached.move_to_end(key)
            while len(self._cached) > CACHED:
                self._cached.popitem(last=False)
            return self._cached[key]
