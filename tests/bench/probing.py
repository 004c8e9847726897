"""Decides which inverted lists a query visits: by the share of its neighbours that each is predicted to hold.

The lists of the nearest centroids are a good guess for queries that lie where the rows lie. Captions do not: their
tower stands apart from the images'. A softmax over the lists, learned from other captions and the lists of their
neighbours, predicts better, and its shares tell how many lists a query needs: one that is sure of three lists visits
three, another thirty. Any coarse quantizer serves, for only lists of the nearest centroids are looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from clip_batch.index.ann.libfaiss import Ids, Vectors

MOST = 4
"""Lists that a query may visit, and nearest centroids that are looked at, for each list of the effort."""

SCALES = 5.0 * 1.5 ** np.arange(9)
"""Factors of inner products with centroids that are tried: the softmax of CLIP's cosines needs some 20."""

BATCH, EPOCHS = 256, 5
RATE = 0.2
"""The step of each weight at the beginning of learning; it falls to zero."""
MOMENTUM, VARIANCE, TINY = 0.9, 0.999, 1e-8
"""Adam's constants."""


@dataclass(frozen=True)
class Probing:
    """A predictor of the shares of a query's neighbours that the lists hold: the softmax of a score of each list.

    The score is `scale` times the inner product with the centroid, or, if there are `weights` float32 (lists, d + 1),
    the inner product of a list's row with the query, to which a 1 is appended.
    """

    scale: float
    weights: Vectors | None = None


def fit_scale(centroids: Vectors, queries: Vectors, lists: Ids) -> Probing:
    """A predictor of the centroids alone, from some hundred queries (n, d) and the lists (n, k) of their best rows."""
    scores = queries @ centroids.T
    hits = np.take_along_axis(scores, lists, 1)

    def loss(scale: float) -> float:
        top = scores.max(axis=1)
        total = np.log(np.exp(scale * (scores - top[:, None])).sum(axis=1)) + scale * top
        return float(np.mean(total[:, None] - scale * hits))

    return Probing(min(map(float, SCALES), key=loss))


def learn(centroids: Vectors, queries: Vectors, lists: Ids, epochs: int = EPOCHS, seed: int = 0) -> Probing:
    """A predictor for queries like these (n, d), of which `lists` (n, k) are the lists of their k best rows.

    Some 10,000 queries and k = 30 to 100 are good, and rows found by RaBitQ codes serve as well as the exact ones. They
    must be the best of all rows, or nearly: from a sample of rows less is learned. Leave zero vectors out, and give no
    list as -1. Learning begins at the centroids (lists, d) and lessens the cross entropy by Adam; an epoch takes
    4 * n * lists * d floating point operations. Equal arguments give equal results.
    """
    start = fit_scale(centroids, queries[:BATCH], lists[:BATCH])
    weights = np.hstack([np.float32(start.scale) * centroids, np.zeros((len(centroids), 1), np.float32)])
    mean, square = np.zeros_like(weights), np.zeros_like(weights)
    rng, steps, step = np.random.default_rng(seed), epochs * -(-len(queries) // BATCH), 0
    for _ in range(epochs):
        order = rng.permutation(len(queries))
        for batch in (order[low : low + BATCH] for low in range(0, len(order), BATCH)):
            step += 1
            some = _with_one(queries[batch])
            errors = _softmax(some @ weights.T)
            np.subtract.at(errors, (np.arange(len(batch))[:, None], lists[batch]), np.float32(1 / lists.shape[1]))
            gradient = errors.T @ some / np.float32(len(batch))
            mean += (1 - MOMENTUM) * (gradient - mean)
            square += (1 - VARIANCE) * (gradient * gradient - square)
            rate = RATE * (1 - step / steps) / (1 - MOMENTUM**step)
            weights -= rate * mean / (np.sqrt(square / (1 - VARIANCE**step)) + TINY)
    return Probing(start.scale, weights)


def choose(probing: Probing, queries: Vectors, effort: float, lists: Ids, scores: Vectors) -> tuple[Ids, Vectors]:
    """The lists (n, m) that queries (n, d) visit, those of nearer centroids first, and their centroids' scores (n, m).

    m is the most that any of the queries visits; the others' lists are followed by -1, which faiss passes over.
    `lists` and `scores` (n, `candidates(effort)`) are those of the nearest centroids. A list is visited if its
    predicted share is 1 / effort^2 or more, which on average are one to two times `effort` lists, or if no other's is
    larger.
    """
    logits = _logits(probing, queries, lists, scores)
    top = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - top).sum(axis=1, keepdims=True)
    visited = logits >= top + np.minimum(np.log(total) - np.float32(2 * math.log(effort)), 0)
    if len(queries) == 1:  # as below, in a third of the time
        return lists[:, visited[0]], scores[:, visited[0]]
    counts = visited.sum(axis=1, keepdims=True)
    order = np.argsort(~visited, axis=1, kind="stable")[:, : counts.max()]
    rows = np.arange(len(queries))[:, None]
    chosen = lists[rows, order]
    chosen[np.arange(order.shape[1]) >= counts] = -1
    return chosen, scores[rows, order]


def candidates(effort: float, lists: int) -> int:
    """The number of nearest centroids that `choose` needs to know, of an index of so many lists."""
    return min(math.ceil(MOST * effort), lists)


def _logits(probing: Probing, queries: Vectors, lists: Ids, scores: Vectors) -> Vectors:
    """The scores of lists (n, m) for queries (n, d): (n, m)."""
    if probing.weights is None:
        return np.float32(probing.scale) * scores
    some = _with_one(queries)
    if lists.size < len(probing.weights):
        few: Vectors = np.matmul(probing.weights[lists], some[:, :, None])[:, :, 0]
        return few
    return np.take_along_axis(some @ probing.weights.T, lists, 1)


def _with_one(queries: Vectors) -> Vectors:
    """Queries (n, d), to which a 1 is appended: (n, d + 1)."""
    extended = np.ones((len(queries), queries.shape[1] + 1), np.float32)
    extended[:, :-1] = queries
    return extended


def _softmax(logits: Vectors) -> Vectors:
    """The softmax of each row, in place."""
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return logits
