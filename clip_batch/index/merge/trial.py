"""Recall trials: held-out queries searched at several efforts among some rows, and compared with exact search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from clip_batch.embeddings.reader import blocks
from clip_batch.index.ann import faiss_index, faiss_search, predictor, recall, shared_lists
from clip_batch.index.ann.libfaiss import Index
from clip_batch.index.ann.order import best
from clip_batch.index.ann.predictor import Predictor
from clip_batch.index.ann.rerank import candidates, score
from clip_batch.index.ann.rows import Ordered
from clip_batch.storage import npy

SHARE = 0.5
"""The effort at which predicted lists are first tried, as a share of that which the nearest centroids' lists need."""

SATURATED = 0.99
"""Share of equal scores at two successive efforts from which no larger effort is tried."""

ENOUGH, FEW, FEW_PREDICTED = 0.3, -1.0, 0.0
"""Stop raising the effort at a recall of target + ENOUGH * (1 - target), lowering it at target + FEW * (1 - target)."""

PREDICTED = "predicted."
"""Prefix of the kinds of queries, in trials, whose lists are predicted."""

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
    predictors: Mapping[str, Predictor],
    factor: int,
    target: float,
    first: int | None = None,
    shards: int = 1,
) -> dict[str, recall.RecallTrial]:
    """The trial of the queries of each kind among `rows`, which are those of one of `shards` index shards.

    `queries` has vectors (q, d) and which row (q,) each query is itself, or -1. With a re-ranking `factor` the trial
    holds the candidates: which of them are re-ranked is decided among all shards'. The efforts about those that reach
    the recall `target` are tried, beginning at `first` (by default where most indices reach it). Queries of the kinds
    of `predictors` are tried again with predicted lists, in a trial under their kind with the prefix `PREDICTED`.
    """
    kinds = list(queries)
    scores, ids = _exact(rows, np.concatenate([queries[kind][0] for kind in kinds]))
    ends = np.cumsum([len(queries[kind][0]) for kind in kinds])[:-1]
    exact = dict(zip(kinds, zip(np.split(scores, ends), np.split(ids, ends), strict=True), strict=True))
    efforts: list[int | None] = [*faiss_index.efforts(index)] or [None]
    start = efforts.index(first) if first in efforts else efforts.index(faiss_index.first_effort(index))
    high, depth = target + ENOUGH * (1 - target), candidates(recall.TOP, factor)
    trials = {}

    def tried(
        kind: str,
        search: Callable[[int | None], tuple[Vectors, Ids]],
        efforts: Sequence[int | None],
        start: int,
        low: float,
    ) -> recall.RecallTrial:
        """The trial of a kind of queries, of which `search` finds scores and rows."""
        vectors, own = queries[kind]

        def find(effort: int | None) -> Hits:
            scores, ids = search(effort)
            true = score(vectors, ids, rows)
            measured = recall.measure(own, exact[kind], {0: (scores, ids, true)}, depth)
            recalls = [recall.recall(measured, 0, k, factor, shards) for k in recall.DEPTHS]
            return Hits(scores, ids, true, tuple(1.0 if value is None else value for value in recalls))

        results = try_efforts(
            efforts,
            start,
            find,
            too_little=lambda hits: hits.recalls[0] <= target + low * (1 - target),
            enough=lambda hits: min(hits.recalls) >= high,
            saturated=_saturated,
        )
        hits = {place: (each.scores, each.ids, each.true) for place, each in results.items()}
        return recall.measure(own, exact[kind], hits, depth)

    for kind, (vectors, _) in queries.items():
        search = partial(faiss_search.search, index, vectors, depth)
        trials[kind] = tried(kind, search, efforts, start, FEW)
        if kind in predictors:
            nearest = efforts[trials[kind].places[recall.least_effort(trials[kind], target, 10, factor, shards)[0]]]
            own_efforts = predictor.efforts(len(predictors[kind].bias))
            place = min(int(np.searchsorted(own_efforts, SHARE * (nearest or 1))), len(own_efforts) - 1)
            search = partial(_predicted, index, vectors, depth, predictors[kind])
            trials[PREDICTED + kind] = tried(kind, search, own_efforts, place, FEW_PREDICTED)
    return trials


def _predicted(index: Index, vectors: Vectors, depth: int, lists: Predictor, effort: int | None) -> tuple[Vectors, Ids]:
    """The `depth` best rows of vectors (q, d) in the lists that are predicted: scores and rows (q, depth)."""
    shared = shared_lists.share([index])
    assert shared is not None
    probe = shared_lists.probe(shared, vectors, effort, lists)
    return shared_lists.search(shared, 0, probe, depth, shared_lists.parameters(probe))


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
