"""Rows of vectors in the order of an index, without a copy of them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from clip_batch.embeddings.reader import Rows, blocks
from clip_batch.storage.npy import Half, half_header


@dataclass(frozen=True)
class Ordered:
    """The rows `order` (n,) of `vectors`, copied only as they are indexed: a whole copy would double the memory."""

    vectors: Half
    order: Rows

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, at: slice | Rows) -> Half:
        rows: Half = self.vectors[self.order[at]]
        return rows

    def save(self, file: IO[bytes]) -> None:
        """Write the rows as an npy file of float16 (n, d)."""
        file.write(half_header(len(self), self.vectors.shape[1]))
        for block in blocks(len(self)):
            file.write(self[block].tobytes())


class Stacked:
    """Several matrices (n, d), stacked, of which rows are taken by their numbers in the stack."""

    def __init__(self, matrices: Sequence[Half]) -> None:
        self._matrices = matrices
        self._starts = np.cumsum([0, *map(len, matrices)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: Rows) -> Half:
        out = np.empty((len(rows), self._matrices[0].shape[1]), dtype=np.float16)
        owner = np.searchsorted(self._starts, rows, "right") - 1
        for number in np.unique(owner):
            places = np.flatnonzero(owner == number)
            out[places] = self._matrices[number][rows[places] - self._starts[number]]
        return out
