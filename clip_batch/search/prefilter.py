"""Evaluate a condition on all metadata of an index before a search, which then finds rows that rarely match."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from threading import Event, Lock

from clip_batch.search.backend import Backend
from clip_batch.search.conditions import Condition
from clip_batch.search.evaluate import Check, unchecked
from clip_batch.search.rows import RowSet

CACHED = 64 * 2**20
"""Bytes of row sets that are cached, unless it is said otherwise."""

_LOOK = 0.05
"""Seconds between two calls of a Check while another thread evaluates the same condition."""


class Prefilter:
    """Caches the rows of an open index that meet conditions, up to `limit` bytes; the least recently used go first.

    Threads that need the same condition evaluate it once. No lock is held meanwhile.
    """

    def __init__(self, backend: Backend, limit: int = CACHED) -> None:
        self._backend, self._limit, self._size, self._lock = backend, limit, 0, Lock()
        self._cached: OrderedDict[bytes, RowSet] = OrderedDict()
        self._working: dict[bytes, Event] = {}

    def select(self, condition: Condition, check: Check = unchecked) -> RowSet:
        """Return the rows for which the condition is true. Slow unless cached: all values of its columns are read.

        Raises what `check` raises, which is called every now and then.
        """
        # Not the condition itself, which equals one with 1.0 or true in place of 1.
        key = hashlib.sha256(repr(condition).encode(errors="surrogatepass")).digest()
        while True:
            with self._lock:
                if key in self._cached:
                    self._cached.move_to_end(key)
                    return self._cached[key]
                if (done := self._working.get(key)) is None:
                    done = self._working[key] = Event()
                    break
            while not done.wait(_LOOK):
                check()
        try:
            rows = self._backend.where(condition, check)
            self._keep(key, rows)
            return rows
        finally:  # where this thread gave up, one of those that wait tries
            with self._lock:
                del self._working[key]
            done.set()

    def _keep(self, key: bytes, rows: RowSet) -> None:
        with self._lock:
            self._cached[key] = rows
            self._size += rows.nbytes
            while self._size > self._limit:
                self._size -= self._cached.popitem(last=False)[1].nbytes
