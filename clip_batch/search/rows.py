"""Types of ids and vectors, and sets of rows to which a search is restricted."""

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
    """Rows that a search may find: sorted ids int64 (n,), none of them removed. `Searcher.select` returns one."""

    ids: Ids
    _others: dict[tuple[int, int], faiss_search.Removed] = field(default_factory=dict)

    def others(self, offset: int, rows: int) -> faiss_search.Removed:
        """Return the rows in [offset, offset + rows) that are not in the set, numbered from `offset`."""
        if (offset, rows) not in self._others:
            included = np.zeros(rows, dtype=bool)
            low, high = np.searchsorted(self.ids, [offset, offset + rows])
            included[self.ids[low:high] - offset] = True
            self._others[offset, rows] = faiss_search.Removed(np.flatnonzero(~included))
        return self._others[offset, rows]


def selection(manifest: Manifest, removed: Ids, ids: npt.ArrayLike) -> RowSet:
    """Return the set of the rows `ids` without removed ones. ConfigError: an id is not in the index."""
    row_ids = np.unique(np.asarray(ids, dtype=np.int64))
    if len(row_ids) and (row_ids[0] < 0 or row_ids[-1] >= manifest.rows):
        raise ConfigError(f"ids are 0 to {manifest.rows - 1}")
    return RowSet(row_ids[~removed_rows.contains(removed, row_ids)])
