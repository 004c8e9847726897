"""Exact re-ranking: the candidates of a lossy index, scored with the float16 vectors that are stored beside it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from clip_batch.index.ann.order import best
from clip_batch.storage.npy import Half, widen

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

PAIRS = 512
"""Pairs of query and row that are scored at a time: they fit in the processor's cache."""

MOST = 10_000
"""Most candidates that are scored for the sake of a better order: each costs a read of its vector."""

FEWEST = 200
"""Candidates that are always scored: few cost little, and the nearest rows are those that codes confuse most."""

TINY = 1e-12
"""The norm that a row of zeros is divided by."""


class RowSource(Protocol):
    """Float16 rows (n, d) that are indexed by their numbers: an array, or an object that reads rows when indexed."""

    def __getitem__(self, rows: Ids, /) -> Half: ...


def candidates(k: int, factor: int) -> int:
    """How many candidates are scored for the k best: `factor` * k, at least `FEWEST`, at most `MOST`, never under k."""
    return max(min(factor * k, MOST), k, FEWEST)


def rerank(queries: Vectors, ids: Ids, vectors: RowSource, k: int) -> tuple[Vectors, Ids]:
    """The k best of each query's candidates by exact inner product: scores float32 (q, k), ids int64 (q, k).

    `queries` is float32 (q, d); `ids` (q, m) are rows of `vectors` float16 (n, d), -1 where there is none. The order is
    by descending score, then ascending id; -inf and -1 where there are fewer than k.
    """
    return best(score(queries, ids, vectors), ids, k)


def score(queries: Vectors, ids: Ids, vectors: RowSource) -> Vectors:
    """Inner products float32 (q, m) of queries (q, d) and their rows (q, m), scaled to unit norm; -inf where id is -1.

    A score depends on its query and row alone. Rows are read in ascending order over all queries, some hundred at a
    time.
    """
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    order = order[np.searchsorted(flat[order], 0) :]
    scores = np.full(flat.shape, -np.inf, dtype=np.float32)
    for low in range(0, len(order), PAIRS):
        pairs = order[low : low + PAIRS]
        rows = widen(vectors[flat[pairs]])
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        scores[pairs] = np.einsum("nd,nd->n", rows, queries[pairs // ids.shape[1]]) / np.maximum(norms, TINY)
    return scores.reshape(ids.shape)
