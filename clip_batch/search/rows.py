"""Rows of an index: their ids, their vectors, and sets of rows that a search is restricted to."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from clip_batch.errors import ConfigError
from clip_batch.index import removed_rows
from clip_batch.index.ann import faiss_search
from clip_batch.index.manifest import Manifest

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RowSet:
    """Rows that a search may find: ids (n,), sorted, none of them removed. `Searcher.select` makes it."""

    ids: Ids
    _others: dict[tuple[int, int], faiss_search.Removed] = field(default_factory=dict)

    def others(self, offset: int, rows: int) -> faiss_search.Removed:
        """The other rows among [offset, offset + rows), counted from there."""
        if (offset, rows) not in self._others:
            there = np.zeros(rows, dtype=bool)
            low, high = np.searchsorted(self.ids, [offset, offset + rows])
            there[self.ids[low:high] - offset] = True
            self._others[offset, rows] = faiss_search.Removed(np.flatnonzero(~there))
        return self._others[offset, rows]


def selection(manifest: Manifest, removed: Ids, ids: npt.ArrayLike) -> RowSet:
    """The rows without the removed ones. ConfigError: an id is not of the index."""
    found = np.unique(np.asarray(ids, dtype=np.int64))
    if len(found) and (found[0] < 0 or found[-1] >= manifest.rows):
        raise ConfigError(f"ids are 0 to {manifest.rows - 1}")
    return RowSet(found[~removed_rows.contains(removed, found)])
