"""Types of ids and vectors, and sets of rows to which a search is restricted."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from clip_batch.errors import ConfigError
from clip_batch.index.ann import faiss_search
from clip_batch.index.manifest import Manifest

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

EXACT = 10_000
"""Up to this many selected rows are all scored, rather than searched for in the lists of the index."""


@dataclass(frozen=True, eq=False)
class RowSet:
    """Rows that a search may find, none of them removed, as a bit for each row. `Searcher.select` returns one.

    `bits` (uint8, the lowest bit first) has `count` ones among the first `rows`.
    """

    bits: npt.NDArray[np.uint8]
    rows: int
    count: int
    _others: dict[tuple[int, int], faiss_search.AllBut] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: npt.NDArray[np.bool_]) -> RowSet:
        """The rows for which a mask (rows,) is true."""
        return cls(np.packbits(mask, bitorder="little"), len(mask), int(np.count_nonzero(mask)))

    @property
    def nbytes(self) -> int:
        """The memory that the set takes, once it was searched in one modality."""
        return 2 * self.bits.nbytes + 8 * min(self.count, EXACT)

    @property
    def ids(self) -> Ids:
        """The sorted ids int64 (count,)."""
        return self._few if self.count <= EXACT else self._all()

    @cached_property
    def _few(self) -> Ids:
        return self._all()

    def _all(self) -> Ids:
        return np.flatnonzero(np.unpackbits(self.bits, count=self.rows, bitorder="little"))

    def others(self, offset: int, rows: int) -> faiss_search.AllBut:
        """Return the rows in [offset, offset + rows) that are not in the set, numbered from `offset`."""
        if (offset, rows) not in self._others:
            start = offset // 8
            bits = np.unpackbits(self.bits[start : -(-(offset + rows) // 8)], bitorder="little")
            kept = bits[offset - 8 * start :][:rows]
            self._others[offset, rows] = faiss_search.AllBut(
                np.packbits(kept, bitorder="little"), rows, int(np.count_nonzero(kept))
            )
        return self._others[offset, rows]


def selection(manifest: Manifest, removed: Ids, ids: npt.ArrayLike) -> RowSet:
    """Return the set of the rows `ids` without removed ones. ConfigError: an id is not in the index."""
    row_ids = np.asarray(ids, dtype=np.int64).reshape(-1)
    if len(row_ids) and (row_ids.min() < 0 or row_ids.max() >= manifest.rows):
        raise ConfigError(f"ids are 0 to {manifest.rows - 1}")
    mask = np.zeros(manifest.rows, dtype=bool)
    mask[row_ids] = True
    mask[removed] = False
    return RowSet.of(mask)
