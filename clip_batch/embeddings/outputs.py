"""Several OUTs of one encoder as one long matrix: the rows of the first, then those of the second, and so on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from clip_batch.embeddings.reader import Embeddings, Rows, shares
from clip_batch.plan import paths
from clip_batch.storage.npy import Half
from clip_batch.types import Commit

if TYPE_CHECKING:
    import pyarrow as pa


class Span(NamedTuple):
    """The rows [start, stop) of one OUT, of which row 0 is row `first` of all."""

    source: Embeddings
    first: int
    start: int
    stop: int


@dataclass(frozen=True)
class Outputs:
    """Some OUTs; a kind of vectors that an OUT lacks is all zero there, as if nothing of it had a caption."""

    sources: tuple[Embeddings, ...]

    @property
    def starts(self) -> list[int]:
        """The first row of each OUT, and the number of all rows."""
        return [0, *accumulate(source.rows for source in self.sources)]

    @property
    def rows(self) -> int:
        """The number of rows of all OUTs."""
        return self.starts[-1]

    @property
    def dim(self) -> int:
        """The dimension of the vectors."""
        return next(source.dim for source in self.sources if source.commits)

    @property
    def urls(self) -> str:
        """The OUTs, for messages."""
        return ", ".join(dict.fromkeys(source.store.url for source in self.sources))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of vectors that an OUT with rows has."""
        return tuple(kind for kind in paths.VECTORS if any(self.having(kind)))

    def having(self, kind: str) -> list[bool]:
        """Whether each part of each OUT has vectors of a kind."""
        return [kind in source.kinds for source in self.sources for _ in source.commits]

    @property
    def commits(self) -> list[Commit]:
        """The parts of all OUTs."""
        return [commit for source in self.sources for commit in source.commits]

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """The runs of rows that the OUTs have of rows [start, stop)."""
        for source, first in zip(self.sources, self.starts, strict=False):
            low, high = max(start - first, 0), min(stop - first, source.rows)
            if low < high:
                yield Span(source, first, low, high)

    def read_vectors(self, kind: str, start: int, stop: int) -> Half:
        """Rows [start, stop) as float16 (n, dim); their values are not checked (see `check_rows`)."""
        pieces = [
            source.read_vectors(kind, low, high)
            if kind in source.kinds
            else np.zeros((high - low, source.dim), np.float16)
            for source, _, low, high in self.spans(start, stop)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty((0, self.dim), np.float16), *pieces])

    def read_metadata(self, start: int, stop: int) -> Iterator[pa.Table]:
        """Metadata rows [start, stop), part by part, with their lineage; OUTs may differ in their columns."""
        for source, _, low, high in self.spans(start, stop):
            yield from source.read_metadata(low, high)

    def read_captionless(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Which of the rows [start, stop) have no caption, so that their text vector may be all zero: (n,)."""
        parts = [source.read_captionless(low, high) for source, _, low, high in self.spans(start, stop)]
        return np.concatenate([np.empty(0, dtype=bool), *parts])

    def gather(self, kind: str, rows: Rows) -> Half:
        """Rows (n,), ascending, as float16 (n, dim); their values are not checked."""
        pieces = [np.empty((0, self.dim), dtype=np.float16)]
        for source, first, low, high in self.spans(0, self.rows):
            own = rows[slice(*np.searchsorted(rows, [first + low, first + high]))] - first
            has = kind in source.kinds
            pieces.append(source.gather(kind, own) if has else np.zeros((len(own), source.dim), np.float16))
        return np.concatenate(pieces)

    def draw(
        self, kind: str, filled: Sequence[int], count: int, seed: int, without: Rows | None = None
    ) -> tuple[Rows, Half]:
        """A random sample of all OUTs; `filled` is of all their parts, and has 0 where an OUT lacks that kind.

        See `Embeddings.draw`.
        """
        from_each, at = shares(filled, count), 0
        rows, vectors = [np.empty(0, dtype=np.int64)], [np.empty((0, self.dim), dtype=np.float16)]
        for source, first, _, high in self.spans(0, self.rows):
            part = slice(at, at + len(source.commits))
            left_out = None if without is None else without[slice(*np.searchsorted(without, [first, first + high]))]
            own = None if left_out is None else left_out - first
            drawn, half = source.draw_shares(kind, filled[part], from_each[part], seed, own)
            rows.append(drawn + first)
            vectors.append(half)
            at += len(source.commits)
        return np.concatenate(rows), np.concatenate(vectors)

    def check_files(self) -> list[int]:
        """The number of captioned rows of each part, once the headers, sizes and counts of all parts are checked.

        CorruptError names the first file that is wrong.
        """
        return [count for source in self.sources for count in source.check_files(source.kinds)]

    def check_rows(self, kind: str, start: int, vectors: Half, captionless: npt.NDArray[np.bool_]) -> None:
        """Check vectors (n, dim), the rows from `start` on, of which captions may be missing: see `Embeddings`."""
        for source, first, low, high in self.spans(start, start + len(vectors)):
            if kind in source.kinds:
                own = slice(first + low - start, first + high - start)
                source.check_rows(kind, low, vectors[own], captionless[own] if kind == "text" else None)
