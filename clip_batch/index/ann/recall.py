"""Recall against exact search, measured shard by shard and folded: no shard needs another's vectors.

A trial holds, for held-out queries among some rows, the 100 best scores of exact search and, for each effort, the hits:
the scores that ranked them and their exact scores. Two trials over different rows fold into the trial over both, which
keeps the best ranked hits of both. A hit counts at k if its exact score reaches the k-th best score less 1e-6, so that
of equal vectors any will do (recall by threshold, as ANN-benchmarks measures it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from clip_batch.index.ann.rerank import candidates

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

TOP = 100
"""Best scores of exact search that a trial keeps."""

TIE = 1e-6
"""Scores that differ by less are equal."""

DEPTHS = (10, 100)
"""The k for which the search effort is tuned, and recall is promised."""

FEW = 30
"""Fewer queries than these say too little of a kind to tune by."""


Recall = TypedDict(
    "Recall",
    {"1": float, "10": float, "100": float, "interval_10": float, "interval_100": float, "queries": float},
    total=False,
)
"""Recall (0..1) by k, half the width of its 95 % confidence interval (older manifests lack it), number of queries."""


@dataclass(frozen=True)
class RecallTrial:
    """float32 scores, descending, -inf where there are fewer rows: `exact` (q, 100), `ranked` (efforts, q, depth).

    `true`, of the same shape as `ranked`, has the exact scores of those hits. `places` (efforts,) are the positions,
    ascending, of the efforts that were tried among all efforts.
    """

    exact: Floats
    ranked: Floats
    true: Floats
    places: Ids


def measure(
    own: Ids, exact: tuple[Floats, Ids], hits: Mapping[int, tuple[Floats, Ids, Floats]], depth: int = TOP
) -> RecallTrial:
    """The trial of queries over one shard, which keeps the `depth` best ranked hits.

    `own` (q,) is the shard row that a query is itself, to be left out (-1: none). `exact` has the scores and rows
    (q, any) of exact search; `hits` has, by the position of the effort, the scores that ranked, the rows, and their
    exact scores, each (q, any). Rows are -1 where there are fewer.
    """

    def others(scores: Floats, ids: Ids) -> Floats:
        return np.where((ids < 0) | (ids == own[:, None]), -np.inf, scores).astype(np.float32)

    places = sorted(hits)
    kept = [_best(depth, others(ranked, ids), others(true, ids)) for ranked, ids, true in map(hits.__getitem__, places)]
    ranked, true = zip(*kept, strict=True)
    return RecallTrial(_best(TOP, others(*exact))[0], np.stack(ranked), np.stack(true), np.array(places))


def arrays(trial: RecallTrial, name: str) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a trial for an npz file, under a name."""
    return {f"{name}.{field}": array for field, array in vars(trial).items()}


def load(stored: Mapping[str, npt.NDArray[Any]], name: str) -> RecallTrial:
    """The trial that `arrays` named so. One of an older version has all efforts, and no `places`."""
    exact, ranked, true = (stored[f"{name}.{field}"] for field in ("exact", "ranked", "true"))
    key = f"{name}.places"
    return RecallTrial(exact, ranked, true, stored[key] if key in stored else np.arange(len(ranked)))


def _best(count: int, by: Floats, *others: Floats) -> list[Floats]:
    """The `count` columns of `by` and other arrays (..., any) with the largest `by`; descending, -inf beyond."""
    order = np.argsort(-by, axis=-1, kind="stable")[..., :count]
    padding = [(0, 0)] * (by.ndim - 1) + [(0, count - order.shape[-1])]
    return [np.pad(np.take_along_axis(array, order, -1), padding, constant_values=-np.inf) for array in (by, *others)]


def fold(one: RecallTrial, other: RecallTrial) -> RecallTrial:
    """The trial over the rows of both trials, of the same depth, at every effort that either tried.

    An effort below those that a trial tried counts as if it had found nothing there, one above as if it had found what
    the largest did: no recall is reported too high.
    """
    places = np.union1d(one.places, other.places)
    exact = np.concatenate([one.exact, other.exact], axis=-1)
    pairs = zip(_at(one, places), _at(other, places), strict=True)
    ranked, true = (np.concatenate(pair, axis=-1) for pair in pairs)
    ranked, true = _best(one.ranked.shape[-1], ranked, true)
    return RecallTrial(_best(TOP, exact)[0], ranked, true, places)


def _at(trial: RecallTrial, places: Ids) -> tuple[Floats, Floats]:
    """The trial's `ranked` and `true` at other efforts."""
    nearest = np.searchsorted(trial.places, places, "right") - 1
    below = nearest < 0
    ranked, true = (array[np.maximum(nearest, 0)] for array in (trial.ranked, trial.true))
    ranked[below], true[below] = -np.inf, -np.inf
    return ranked, true


def recall(trial: RecallTrial, effort: int, k: int, factor: int = 0, shards: int = 1) -> float | None:
    """Recall at k of the `effort`-th effort tried: the mean over queries, 0..1. None where there are no rows.

    With a re-ranking `factor` the hits are the k best, by exact scores, of `candidates(k, factor)`. `shards` is of how
    many alike shards this is one: it is then the recall of its share of k, from its share of the candidates.
    """
    values = _recalls(trial, effort, k, factor, shards)
    return None if values is None else float(np.mean(values))


def interval(trial: RecallTrial, effort: int, k: int, factor: int = 0) -> float:
    """Half the width of the 95 % confidence interval of `recall`: 1.96 standard errors of the mean over queries."""
    values = _recalls(trial, effort, k, factor, 1)
    return 0.0 if values is None or len(values) < 2 else float(1.96 * np.std(values, ddof=1) / np.sqrt(len(values)))


def _recalls(trial: RecallTrial, effort: int, k: int, factor: int, shards: int) -> npt.NDArray[np.float64] | None:
    depth, k = (candidates(k, factor) if factor else k), -(-k // shards)
    depth = -(-depth // shards)
    rows = np.minimum(np.isfinite(trial.exact).sum(axis=1), k)
    some = rows > 0
    if not some.any():
        return None
    last = trial.exact[some, rows[some] - 1]
    hits = trial.true[effort, some, :depth]
    if k < hits.shape[1]:
        hits = -np.partition(-hits, k - 1, axis=1)[:, :k] if factor else hits[:, :k]
    right = (hits >= last[:, None] - TIE).sum(axis=1)
    shares: npt.NDArray[np.float64] = np.minimum(right, rows[some]) / rows[some]
    return shares


def least_effort(trial: RecallTrial, target: float, k: int, factor: int = 0, shards: int = 1) -> tuple[int, bool]:
    """(number, True) of the least effort tried whose recall at k (see `recall`) reaches the target.

    Where none does, (number, False) of the least effort with the recall of the largest.
    """
    recalls = [recall(trial, number, k, factor, shards) for number in range(len(trial.places))]
    for number, value in enumerate(recalls):
        if value is None or value >= target:
            return number, True
    return recalls.index(recalls[-1]), False


def summary(trial: RecallTrial, efforts: Sequence[int], factor: int = 0) -> Recall | None:
    """Recall at each of `DEPTHS` by the effort for it, an `efforts`-th of those tried; None without rows to find."""
    shallow, deep = efforts
    at_1, at_10 = (recall(trial, shallow, k, factor) for k in (1, 10))
    at_100 = recall(trial, deep, 100, factor)
    if at_1 is None or at_10 is None or at_100 is None:  # all of them are, or none is
        return None
    return {
        "1": at_1,
        "10": at_10,
        "100": at_100,
        "interval_10": interval(trial, shallow, 10, factor),
        "interval_100": interval(trial, deep, 100, factor),
        "queries": float(len(trial.exact)),
    }
