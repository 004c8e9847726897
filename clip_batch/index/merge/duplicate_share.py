"""Measures which share of the duplicates was found: a sample of the rows, compared with all rows exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from clip_batch.embeddings.outputs import Outputs
from clip_batch.embeddings.reader import BLOCK, Rows
from clip_batch.index.merge import live_duplicates
from clip_batch.index.merge.duplicates import DOUBT, TILE, Duplicates, close
from clip_batch.index.merge.live_duplicates import LiveRows
from clip_batch.index.removed_rows import contains
from clip_batch.storage import npy
from clip_batch.storage.npy import Vectors

LEAST_SAMPLE, MOST_SAMPLE = 1000, 10_000
"""Rows of the sample: 1,000 at least, and more where there are few rows to compare them with."""

PAIRS = 1 << 29
"""Pairs of a row of the sample and another row up to which the sample is larger than the least."""

MOST_ROWS = 4_000_000
"""Rows of OUT, and rows of the index, that the sample is compared with at most: evenly spread blocks of more."""

DEPTH = 256
"""Rows of an index without stored vectors whose codes are nearest, of all its lists, that are compared exactly."""


class Share(NamedTuple):
    """Of `sample` rows `pairs` repeat a row that is kept, or one of the index, and `found` of these were left out.

    Where the sample was compared with a part of the rows, `pairs` counts what was missed there for the rest too.
    """

    sample: int
    pairs: int
    found: int

    @property
    def share(self) -> float | None:
        """The share that was found; None where there are no pairs."""
        return self.found / self.pairs if self.pairs else None


def measure(
    source: Outputs,
    kind: str,
    found: Duplicates,
    threshold: float,
    without: Rows,
    live: LiveRows | None = None,
    seed: int = 0,
) -> Share:
    """Draw rows of OUT, none of them in `without` (sorted), and search for what those that are kept repeat.

    Only vectors of `kind` count. Memory: the sample, and a block of rows.
    """
    rows = _sample(source, kind, without, live.base.rows if live else 0, seed)
    left_out = contains(found.rows, rows)
    kept = rows[~left_out]
    vectors = npy.unit(source.gather(kind, kept))
    missed = np.zeros(len(kept))
    if threshold < 1:  # equal rows of OUT are found by their bits
        missed = _among_new(source, kind, kept, vectors, threshold, np.union1d(found.rows, without))
    if live is not None:
        missed = np.maximum(missed, _among_live(live, vectors, threshold))
    count = int(left_out.sum())
    return Share(len(rows), count + round(float(missed.sum())), count)


def _sample(source: Outputs, kind: str, without: Rows, others: int, seed: int) -> Rows:
    """Random rows, ascending, that have a vector."""
    count = min(max(LEAST_SAMPLE, PAIRS // (source.rows + others)), MOST_SAMPLE)
    rng = np.random.default_rng(seed)
    drawn = np.unique(rng.integers(source.rows, size=2 * count)) if source.rows > count else np.arange(source.rows)
    drawn = drawn[~contains(without, drawn)]
    drawn = drawn[npy.filled(source.gather(kind, drawn))]
    return np.sort(rng.permutation(drawn)[:count])


def _spread(rows: int) -> tuple[list[tuple[int, int]], float]:
    """Blocks [start, stop) of `rows` rows, of all or of `MOST_ROWS` evenly spread ones, and which share that is."""
    starts = np.arange(0, rows, BLOCK)
    if rows > MOST_ROWS:
        starts = starts[np.linspace(0, len(starts) - 1, MOST_ROWS // BLOCK).astype(np.int64)]
    blocks = [(start, min(start + BLOCK, rows)) for start in starts.tolist()]
    return blocks, sum(stop - start for start, stop in blocks) / max(rows, 1)


def _among_new(
    source: Outputs, kind: str, kept: Rows, vectors: Vectors, threshold: float, left_out: Rows
) -> npt.NDArray[np.float64]:
    """How many rows each row (n,) that repeats an earlier kept row stands for; 0 for those that repeat none."""
    missed = np.zeros(len(kept), dtype=np.bool_)
    blocks, share = _spread(source.rows)
    for start, stop in blocks:
        others = np.setdiff1d(np.arange(start, stop), left_out)
        data = npy.unit(source.read_vectors(kind, start, stop)[others - start])
        for mine, near in _close(vectors, data, threshold):
            missed[mine[others[near] < kept[mine]]] = True
    return missed / share


def _among_live(live: LiveRows, vectors: Vectors, threshold: float) -> npt.NDArray[np.float64]:
    """How many rows each vector (n, d) that repeats a row of the index stands for; 0 for those that repeat none."""
    missed = np.zeros(len(vectors), dtype=np.bool_)
    if not live.keeps_vectors:
        rows = np.arange(len(vectors))
        pairs = live_duplicates.search(live, lambda: iter([(rows, vectors)]), threshold, DEPTH, whole=True)
        pairs = live_duplicates.exact(live, lambda some: vectors[some], pairs)
        missed[pairs.rows[pairs.scores >= threshold]] = True
        return missed.astype(np.float64)
    blocks, share = _spread(live.base.rows)
    for shard in live.base.shards:
        with live.stored(shard) as stored:
            for start, stop in blocks:
                ids = np.arange(max(start, shard.offset), min(stop, shard.offset + shard.rows))
                ids = ids[~contains(live.replaced, ids)]
                if len(ids) and stored is not None:
                    for mine, _ in _close(vectors, npy.unit(stored[ids - shard.offset]), threshold):
                        missed[mine] = True
    return missed / share


def _close(mine: Vectors, theirs: Vectors, threshold: float) -> Iterator[tuple[Rows, Rows]]:
    """Yield positions (in `mine`, in `theirs`) of pairs that reach the threshold; 1 means that they are equal."""
    for start in range(0, len(mine), TILE):
        tile = mine[start : start + TILE]
        near, own, _ = close(tile, theirs, min(threshold, 1 - DOUBT))
        if threshold == 1:
            equal = live_duplicates.cosines(tile[own], theirs[near]) == 1
            near, own = near[equal], own[equal]
        yield start + own, near
