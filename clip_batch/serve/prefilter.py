"""Filters looked up in all of an index's metadata before it is searched, so that what is rare is found too."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

import numpy as np

from clip_batch.serve.schema import Filter
from clip_batch.stages.search import Searcher, Selection

KEPT = 16
"""Selections of a version that are kept for the next request with the same filters."""


class Prefilter:
    """The rows of an opened index that meet filters; one request looks them up, others with the same filters wait."""

    def __init__(self, searcher: Searcher) -> None:
        self._searcher, self._lock = searcher, Lock()
        self._kept: OrderedDict[tuple[str, ...], Selection] = OrderedDict()

    def select(self, filters: Sequence[Filter]) -> Selection:
        """Rows that meet all filters. Blocks: every value of their columns is read."""
        key = tuple(condition.model_dump_json() for condition in filters)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._searcher.select(self._look_up(filters))
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]

    def _look_up(self, filters: Sequence[Filter]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        found = []
        for table, shard in zip(self._searcher.tables, self._searcher.manifest.shards, strict=True):
            meets = np.ones(table.rows, dtype=bool)
            for condition in filters:
                meets &= table.where(condition.column, condition.holds)
            found.append(np.flatnonzero(meets) + shard.offset)
        return np.concatenate(found)
