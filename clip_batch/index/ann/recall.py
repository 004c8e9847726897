"""Recall against exact search, measured shard by shard and folded: no shard needs another's vectors.

A trial holds, for held-out queries among some rows, the 100 best scores of exact search and, for each effort, the hits:
the scores that ranked them and their exact scores. Two trials over different rows fold into the trial over both, which
keeps the best ranked hits of both. A hit counts at k if its exact score reaches the k-th best score less 1e-6, so that
of equal vectors any will do (recall by threshold, as ANN-benchmarks measures it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

TOP = 100
"""Best scores of exact search that a trial keeps."""

TIE = 1e-6
"""Scores that differ by less are equal."""

Recall = TypedDict("Recall", {"1": float, "10": float, "100": float, "queries": float})
"""Recall at 1, 10 and 100 (0..1), and of how many queries it is the mean."""


@dataclass(frozen=True)
class RecallTrial:
    """float32 scores, descending, -inf where there are fewer rows: `exact` (q, 100), `ranked` (efforts, q, depth).

    `true`, of the same shape as `ranked`, has the exact scores of those hits.
    """

    exact: Floats
    ranked: Floats
    true: Floats


def measure(
    own: Ids, exact: tuple[Floats, Ids], hits: Sequence[tuple[Floats, Ids, Floats]], depth: int = TOP
) -> RecallTrial:
    """The trial of queries over one shard, which keeps the `depth` best ranked hits.

    `own` (q,) is the shard row that a query is itself, to be left out (-1: none). `exact` has the scores and rows
    (q, any) of exact search; `hits` has for each effort the scores that ranked, the rows, and their exact scores, each
    (q, any). Rows are -1 where there are fewer.
    """

    def others(scores: Floats, ids: Ids) -> Floats:
        return np.where((ids < 0) | (ids == own[:, None]), -np.inf, scores).astype(np.float32)

    kept = [_best(depth, others(ranked, ids), others(true, ids)) for ranked, ids, true in hits]
    ranked, true = zip(*kept, strict=True)
    return RecallTrial(_best(TOP, others(*exact))[0], np.stack(ranked), np.stack(true))


def _best(count: int, by: Floats, *others: Floats) -> list[Floats]:
    """The `count` columns of `by` and other arrays (..., any) with the largest `by`; descending, -inf beyond."""
    order = np.argsort(-by, axis=-1, kind="stable")[..., :count]
    padding = [(0, 0)] * (by.ndim - 1) + [(0, count - order.shape[-1])]
    return [np.pad(np.take_along_axis(array, order, -1), padding, constant_values=-np.inf) for array in (by, *others)]


def fold(one: RecallTrial, other: RecallTrial) -> RecallTrial:
    """The trial over the rows of both trials, of the same depth."""
    exact, ranked, true = (
        np.concatenate([getattr(one, name), getattr(other, name)], axis=-1) for name in ("exact", "ranked", "true")
    )
    return RecallTrial(_best(TOP, exact)[0], *_best(one.ranked.shape[-1], ranked, true))


def reranked(trial: RecallTrial) -> RecallTrial:
    """The trial with its hits ranked by their exact scores."""
    (true,) = _best(trial.true.shape[-1], trial.true)
    return RecallTrial(trial.exact, true, true)


def recall(trial: RecallTrial, effort: int, k: int) -> float | None:
    """Recall at k of the effort at that position: the mean over queries, 0..1. None where there are no rows.

    Where there are fewer than k rows, it is the share of them that is among the hits.
    """
    rows = np.minimum(np.isfinite(trial.exact).sum(axis=1), k)
    some = rows > 0
    if not some.any():
        return None
    last = trial.exact[some, rows[some] - 1]
    right = (trial.true[effort, some, :k] >= last[:, None] - TIE).sum(axis=1)
    return float(np.mean(np.minimum(right, rows[some]) / rows[some]))


def least_effort(trials: list[RecallTrial], target: float) -> tuple[int, bool]:
    """(position, True) of the least effort whose recall@10 reaches the target in every trial.

    Where none does, (position, False) of the least effort with the recalls of the largest.
    """
    places = range(len(trials[0].true))
    recalls = [[value for trial in trials if (value := recall(trial, place, 10)) is not None] for place in places]
    for place in places:
        if all(value >= target for value in recalls[place]):
            return place, True
    return recalls.index(recalls[-1]), False


def summary(trial: RecallTrial, effort: int) -> Recall | None:
    """Recall at each depth of the effort at that position, and the number of queries; None without rows to find."""
    at_1, at_10, at_100 = (recall(trial, effort, k) for k in (1, 10, 100))
    if at_1 is None or at_10 is None or at_100 is None:  # all of them are, or none is
        return None
    return {"1": at_1, "10": at_10, "100": at_100, "queries": float(len(trial.exact))}
