"""Filters looked up in all of an index's metadata before it is searched, so that what is rare is found too."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from clip_batch.search.backend import Backend
from clip_batch.search.filters import Filter
from clip_batch.search.rows import RowSet

KEPT = 16
"""Selections of a version that are kept for the next request with the same filters."""


class Prefilter:
    """The rows of an opened index that meet filters; one request looks them up, others with the same filters wait."""

    def __init__(self, searcher: Backend) -> None:
        self._searcher, self._lock = searcher, Lock()
        self._kept: OrderedDict[tuple[str, ...], RowSet] = OrderedDict()

    def select(self, filters: Sequence[Filter]) -> RowSet:
        """Rows that meet all filters. Blocks: every value of their columns is read."""
        key = tuple(condition.model_dump_json() for condition in filters)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._searcher.select(self._searcher.where(filters))
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]
