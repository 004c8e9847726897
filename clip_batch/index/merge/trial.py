"""Recall trials: held-out queries searched at several efforts among some rows, and compared with exact search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from clip_batch.embeddings.reader import blocks
from clip_batch.index.ann import faiss_index, faiss_search, recall
from clip_batch.index.ann.libfaiss import Index
from clip_batch.index.ann.order import best
from clip_batch.index.ann.rerank import candidates, score
from clip_batch.index.ann.rows import Ordered
from clip_batch.storage import npy

SATURATED = 0.99
"""Share of equal scores at two successive efforts from which no larger effort is tried."""

ENOUGH, FEW = 0.5, -2.0
"""Stop raising the effort at a recall of target + ENOUGH * (1 - target), lowering it at target + FEW * (1 - target)."""

DEPTH = recall.TOP + 1
"""Neighbours of exact search: one of them may be the query itself."""

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


class HasRecall(Protocol):
    """The result of a search at one effort."""

    @property
    def recall(self) -> float: ...


Result = TypeVar("Result", bound=HasRecall)


class Hits(NamedTuple):
    """What a search at one effort returned; arrays (q, any), -inf and -1 where there is no hit.

    `scores` ranked the rows `ids`, `true` are their exact scores, `recall` is the recall@10.
    """

    scores: Vectors
    ids: Ids
    true: Vectors
    recall: float


def run(
    index: Index,
    rows: Ordered,
    queries: Mapping[str, tuple[Vectors, Ids]],
    factor: int,
    target: float,
    first: int | None = None,
    shards: int = 1,
) -> dict[str, recall.RecallTrial]:
    """The trial of the queries of each kind among `rows`, which are those of one of `shards` index shards.

    `queries` has vectors (q, d) and which row (q,) each query is itself, or -1. With a re-ranking `factor` the trial
    holds the candidates: which of them are re-ranked is decided among all shards'. The efforts about the one that
    reaches the recall `target` are tried, beginning at `first` (by default in the middle). Lesser ones count as if
    they had no hits, larger ones as if they had those of the largest that was tried: no recall is reported too high.
    """
    kinds = list(queries)
    scores, ids = _exact(rows, np.concatenate([queries[kind][0] for kind in kinds]))
    ends = np.cumsum([len(queries[kind][0]) for kind in kinds])[:-1]
    exact = dict(zip(kinds, zip(np.split(scores, ends), np.split(ids, ends), strict=True), strict=True))
    efforts: list[int | None] = [*faiss_index.efforts(index)] or [None]
    start = efforts.index(first) if first in efforts else len(efforts) // 2
    low, high = (target + share * (1 - target) for share in (FEW, ENOUGH))
    trials = {}
    for kind, (vectors, own) in queries.items():
        measure = recall_at_10(own, exact[kind], factor, shards)

        def search(effort: int | None, vectors: Vectors = vectors, measure: Measure = measure) -> Hits:
            # As a Searcher of this index will: recall@10 is what the effort is tuned for.
            scores, ids = faiss_search.search(index, vectors, candidates(10, factor), effort)
            true = score(vectors, ids, rows)
            return Hits(scores, ids, true, measure(scores, ids, true))

        tried = try_efforts(efforts, start, search, low, high, _saturated)
        hits = [(each.scores, each.ids, each.true) for each in _at_every_effort(tried, len(efforts))]
        trials[kind] = recall.measure(own, exact[kind], hits, candidates(10, factor))
    return trials


def try_efforts(
    efforts: Sequence[int | None],
    start: int,
    search: Callable[[int | None], Result],
    low: float,
    high: float,
    saturated: Callable[[Sequence[Result]], bool],
) -> dict[int, Result]:
    """The results of the efforts that are worth a search, by their position in `efforts` (ascending).

    From position `start` lesser efforts are tried while the recall is over `low`, then larger ones while it is less
    than `high` and the results so far, in ascending order of effort, are not `saturated`.
    """
    results = {start: search(efforts[start])}
    place = start
    while place > 0 and results[place].recall > low:
        place -= 1
        results[place] = search(efforts[place])
    results = dict(sorted(results.items()))
    place = start
    while place < len(efforts) - 1 and results[place].recall < high:
        place += 1
        results[place] = search(efforts[place])
        if saturated(list(results.values())):
            break
    return results


Measure = Callable[[Vectors, Ids, Vectors], float]
"""The recall@10 of hits: of the scores that ranked them, their rows, and their exact scores, each (q, any)."""


def recall_at_10(own: Ids, exact: tuple[Vectors, Ids], factor: int = 0, shards: int = 1) -> Measure:
    """A function that measures the recall@10 of hits, given the scores and rows (q, any) of exact search.

    With re-ranking it is the recall of a shard's share of ten, from its share of the candidates. `own` is as in `run`.
    """
    k = -(-10 // shards) if factor else 10
    depth = candidates(10, factor) * k // 10

    def measure(scores: Vectors, ids: Ids, true: Vectors) -> float:
        trial = recall.measure(own, exact, [(scores, ids, true)], depth)
        return recall.recall(recall.reranked(trial) if factor else trial, 0, k) or 0.0

    return measure


def _saturated(results: Sequence[Hits]) -> bool:
    return bool(np.mean(results[-1].scores == results[-2].scores) > SATURATED)


def _at_every_effort(tried: Mapping[int, Hits], count: int) -> list[Hits]:
    """Hits at each of `count` efforts: none below those that were tried, those of the largest above."""
    least, most = min(tried), max(tried)
    scores, ids, true, _ = tried[least]
    nothing = Hits(np.full_like(scores, -np.inf), np.full_like(ids, -1), np.full_like(true, -np.inf), 0.0)
    return [nothing if place < least else tried[min(place, most)] for place in range(count)]


def _exact(rows: Ordered, queries: Vectors) -> tuple[Vectors, Ids]:
    """Scores and rows (q, any) of exact search; rows of zeros (no caption) are not searched."""
    scores, ids = np.empty((len(queries), 0), dtype=np.float32), np.empty((len(queries), 0), dtype=np.int64)
    for block in blocks(len(rows)):
        vectors = npy.unit(rows[block])
        filled = np.flatnonzero(np.any(vectors != 0, axis=1))
        if not len(filled):
            continue
        more, places = faiss_search.nearest(queries, vectors[filled], DEPTH)
        scores, ids = best(np.hstack([scores, more]), np.hstack([ids, block.start + filled[places]]), DEPTH)
    return scores, ids
