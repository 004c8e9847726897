"""Recall trials: held-out queries searched at several efforts among some rows, and compared with exact search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

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

ENOUGH, FEW = 0.3, -1.0
"""Stop raising the effort at a recall of target + ENOUGH * (1 - target), lowering it at target + FEW * (1 - target)."""

DEPTH = recall.TOP + 1
"""Neighbours of exact search: one of them may be the query itself."""

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]

Result = TypeVar("Result")


class Hits(NamedTuple):
    """What a search at one effort returned; arrays (q, any), -inf and -1 where there is no hit.

    `scores` ranked the rows `ids`, `true` are their exact scores, `recalls` the recall at each of `recall.DEPTHS`.
    """

    scores: Vectors
    ids: Ids
    true: Vectors
    recalls: tuple[float, ...]


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
    holds the candidates: which of them are re-ranked is decided among all shards'. The efforts about those that reach
    the recall `target` are tried, beginning at `first` (by default where most indices reach it).
    """
    kinds = list(queries)
    scores, ids = _exact(rows, np.concatenate([queries[kind][0] for kind in kinds]))
    ends = np.cumsum([len(queries[kind][0]) for kind in kinds])[:-1]
    exact = dict(zip(kinds, zip(np.split(scores, ends), np.split(ids, ends), strict=True), strict=True))
    efforts: list[int | None] = [*faiss_index.efforts(index)] or [None]
    start = efforts.index(first) if first in efforts else efforts.index(faiss_index.first_effort(index))
    low, high = (target + share * (1 - target) for share in (FEW, ENOUGH))
    depth = candidates(recall.TOP, factor)
    trials = {}
    for kind, (vectors, own) in queries.items():

        def search(effort: int | None, kind: str = kind, vectors: Vectors = vectors, own: Ids = own) -> Hits:
            scores, ids = faiss_search.search(index, vectors, depth, effort)
            true = score(vectors, ids, rows)
            tried = recall.measure(own, exact[kind], {0: (scores, ids, true)}, depth)
            recalls = [recall.recall(tried, 0, k, factor, shards) for k in recall.DEPTHS]
            return Hits(scores, ids, true, tuple(1.0 if value is None else value for value in recalls))

        tried = try_efforts(
            efforts,
            start,
            search,
            too_little=lambda hits: hits.recalls[0] <= low,
            enough=lambda hits: min(hits.recalls) >= high,
            saturated=_saturated,
        )
        hits = {place: (each.scores, each.ids, each.true) for place, each in tried.items()}
        trials[kind] = recall.measure(own, exact[kind], hits, depth)
    return trials


def try_efforts(
    efforts: Sequence[int | None],
    start: int,
    search: Callable[[int | None], Result],
    too_little: Callable[[Result], bool],
    enough: Callable[[Result], bool],
    saturated: Callable[[Sequence[Result]], bool],
) -> dict[int, Result]:
    """The results of the efforts that are worth a search, by their position in `efforts` (ascending).

    From position `start` lesser efforts are tried until the recall is `too_little`, then larger ones until it is
    `enough`, or the results so far, in ascending order of effort, are `saturated`.
    """
    results = {start: search(efforts[start])}
    place = start
    while place > 0 and not too_little(results[place]):
        place -= 1
        results[place] = search(efforts[place])
    results = dict(sorted(results.items()))
    place = start
    while place < len(efforts) - 1 and not enough(results[place]):
        place += 1
        results[place] = search(efforts[place])
        if saturated(list(results.values())):
            break
    return results


def _saturated(results: Sequence[Hits]) -> bool:
    return bool(np.mean(results[-1].scores == results[-2].scores) > SATURATED)


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
