"""Recall against exact search, measured shard by shard and folded: no shard needs another's vectors.

A trial holds, for held-out queries over some rows, the exact top-100 scores and, for each effort, what was
found: by which score it was ranked, and its exact score. Two trials over different rows fold into the
trial over both, of the best ranked of both. A found row counts at k when its exact score reaches the k-th exact
score less 1e-6: so of equal vectors any will do (recall by threshold, as ANN-benchmarks measures it).
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
TIE = 1e-6

Recall = TypedDict("Recall", {"1": float, "10": float, "100": float, "queries": float})
"""Recall at 1, 10 and 100 (0..1), and of how many queries it is the mean."""


@dataclass(frozen=True)
class RecallTrial:
    """exact (q, 100) and ranked (efforts, q, depth), descending; true, of the latter. float32, -inf beyond the rows."""

    exact: Floats
    ranked: Floats
    true: Floats


def measure(
    own: Ids, exact: tuple[Floats, Ids], found: Sequence[tuple[Floats, Ids, Floats]], depth: int = TOP
) -> RecallTrial:
    """The trial of queries over one shard, of the `depth` best ranked that were found.

    `own` (q,) is the shard row that a query is itself, to be left out (-1: none); `exact` has the scores
    and rows (q, any) of exact search, `found` for each effort the scores that ranked, the rows, and their
    exact scores (q, any); rows are -1 where there are fewer.
    """

    def others(scores: Floats, ids: Ids) -> Floats:
        return np.where((ids < 0) | (ids == own[:, None]), -np.inf, scores).astype(np.float32)

    truth = others(*exact)
    tried = [_best(depth, others(ranked, ids), others(true, ids)) for ranked, ids, true in found]
    ranks, trues = zip(*tried, strict=True)
    return RecallTrial(_best(TOP, truth)[0], np.stack(ranks), np.stack(trues))


def _best(count: int, by: Floats, *others: Floats) -> list[Floats]:
    """The `count` columns of arrays (..., any) of largest `by`, stable, descending; padded with -inf."""
    order = np.argsort(-by, axis=-1, kind="stable")[..., :count]
    padding = [(0, 0)] * (by.ndim - 1) + [(0, count - order.shape[-1])]
    return [np.pad(np.take_along_axis(array, order, -1), padding, constant_values=-np.inf) for array in (by, *others)]


def fold(one: RecallTrial, other: RecallTrial) -> RecallTrial:
    """The trial over the rows of both, of the same depth."""
    exact, ranked, true = (
        np.concatenate([getattr(one, name), getattr(other, name)], axis=-1) for name in ("exact", "ranked", "true")
    )
    return RecallTrial(_best(TOP, exact)[0], *_best(one.ranked.shape[-1], ranked, true))


def reranked(trial: RecallTrial) -> RecallTrial:
    """The trial with what was found ranked by exact score."""
    (true,) = _best(trial.true.shape[-1], trial.true)
    return RecallTrial(trial.exact, true, true)


def recall(trial: RecallTrial, effort: int, k: int) -> float | None:
    """Recall at k of the effort of that position: the mean over queries, 0..1. None where no row could be found.

    Where fewer than k rows exist, all of them are what should be found.
    """
    there = np.minimum(np.isfinite(trial.exact).sum(axis=1), k)
    some = there > 0
    if not some.any():
        return None
    last = trial.exact[some, there[some] - 1]
    right = (trial.true[effort, some, :k] >= last[:, None] - TIE).sum(axis=1)
    return float(np.mean(np.minimum(right, there[some]) / there[some]))


def least_effort(trials: list[RecallTrial], target: float) -> tuple[int, bool]:
    """(position, True) of the least effort whose recall@10 reaches the target in every trial.

    Where none does, (position, False) of the least that finds as much as the last.
    """
    places = range(len(trials[0].true))
    found = [[value for trial in trials if (value := recall(trial, at, 10)) is not None] for at in places]
    for at in places:
        if all(value >= target for value in found[at]):
            return at, True
    return found.index(found[-1]), False


def summary(trial: RecallTrial, effort: int) -> Recall | None:
    """Recall at each depth of the effort at that position, and the number of queries; None without rows to find."""
    at_1, at_10, at_100 = (recall(trial, effort, k) for k in (1, 10, 100))
    if at_1 is None or at_10 is None or at_100 is None:  # all of them are, or none is
        return None
    return {"1": at_1, "10": at_10, "100": at_100, "queries": float(len(trial.exact))}
