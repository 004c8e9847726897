"""Predicts which inverted lists hold the best rows of a query, and so how many lists the query needs.

The lists of the nearest centroids are a good guess for queries that lie where the rows lie. Captions do not: their
tower stands apart from the images'. A softmax over the lists, learned from other captions and the lists of their
neighbours, predicts better, and its shares tell how many lists a query needs: one that is sure of three lists visits
three, another thirty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clip_batch.errors import CorruptError
from clip_batch.index.ann.libfaiss import load

if TYPE_CHECKING:
    from clip_batch.index.ann.libfaiss import Ids, Vectors

MOST = 4
"""Lists that a query may visit for each list of the effort."""

MOST_EFFORT = 1024

SCALES = 5.0 * 1.5 ** np.arange(9)
"""Factors of inner products with centroids that are tried: the softmax of CLIP's cosines needs some 20."""

BATCH, EPOCHS = 256, 5
RATE = 0.1
"""The step of each weight at the beginning of learning; it falls to zero."""
KEPT = 0.7
"""The share of what is learned that is kept, on the way from `scaled`: the rest fits the training rows alone."""
MOMENTUM, VARIANCE, TINY = 0.9, 0.999, 1e-8
"""Adam's constants."""


@dataclass(frozen=True)
class Predictor:
    """Predicts the share of a query's best rows that each list holds: the softmax of a score of each list.

    The scores of a query (d,) are `weights` float32 (lists, d) times the query, plus `bias` (lists,). A query is what
    the coarse quantizer gets: it is behind the transforms of the index.
    """

    weights: Vectors
    bias: Vectors

    @classmethod
    def of_array(cls, array: Vectors) -> Predictor:
        """The inverse of `array`. CorruptError: a number is not finite."""
        if not np.isfinite(array).all():
            raise CorruptError("a predictor of lists has numbers that are not finite: run clip-batch verify --deep")
        return cls(np.ascontiguousarray(array[:, :-1]), np.ascontiguousarray(array[:, -1]))

    @property
    def array(self) -> Vectors:
        """The weights with the bias as their last column, float32 (lists, d + 1), as a file has them."""
        return np.hstack([self.weights, self.bias[:, None]])

    def scores(self, queries: Vectors) -> Vectors:
        """The scores (n, lists) of queries (n, d); of one query without waking the threads of a matrix product."""
        if len(queries) != 1:
            return queries @ self.weights.T + self.bias
        faiss, scores, (lists, dim) = load(), np.empty((1, len(self.bias)), np.float32), self.weights.shape
        vectors = map(faiss.swig_ptr, (scores, queries, self.weights))
        faiss.fvec_inner_products_ny(*vectors, dim, lists)
        scores += self.bias
        return scores


def efforts(lists: int) -> list[int]:
    """The efforts that are worth trying in an index of so many lists, ascending.

    They lie closer to each other than those by nearest centroids: recall rises faster with them.
    """
    steps = sorted({round(2 ** (step / 4)) for step in range(4 * max(lists, 2).bit_length())})
    return [effort for effort in steps if effort <= MOST_EFFORT and effort < lists] or [1]


def visits(predictor: Predictor, queries: Vectors, effort: float) -> Ids:
    """The lists (n, m) that queries (n, d) visit, the most promising first, followed by -1 where others visit more.

    A list is visited if its predicted share is 1 / effort^2 or more, or if no other's is larger. On average these are
    one to two times `effort` lists; they are never more than `MOST` times as many.
    """
    chosen = [
        lists
        for low in range(0, len(queries), BATCH)
        for lists in _visited(predictor.scores(queries[low : low + BATCH]), effort)
    ]
    if len(chosen) == 1:
        return chosen[0][None]
    padded = np.full((len(chosen), max(map(len, chosen), default=1)), -1)
    for row, lists in zip(padded, chosen, strict=True):
        row[: len(lists)] = lists
    return padded


def _visited(scores: Vectors, effort: float) -> list[Ids]:
    """The lists that each query visits, by the scores (n, lists) of all lists."""
    top = scores.max(axis=1, keepdims=True)
    total = np.exp(scores - top).sum(axis=1, keepdims=True)
    least = top + np.minimum(np.log(total) - np.float32(2 * math.log(effort)), 0)
    chosen = [np.flatnonzero(row) for row in scores >= least]
    most = math.ceil(MOST * effort)
    return [lists[np.argsort(-row[lists])[:most]] for lists, row in zip(chosen, scores, strict=True)]


def scaled(centroids: Vectors, queries: Vectors, lists: Ids) -> Predictor:
    """A predictor that ranks lists by their centroids (lists, d), and learns from queries how sure it may be.

    Some hundred queries (n, d) suffice, of which `lists` (n, k) are the lists of their k best rows.
    """
    scores = queries @ centroids.T
    hits = np.take_along_axis(scores, lists, 1)

    def loss(scale: float) -> float:
        top = scores.max(axis=1)
        total = np.log(np.exp(scale * (scores - top[:, None])).sum(axis=1)) + scale * top
        return float(np.mean(total[:, None] - scale * hits))

    return Predictor(np.float32(min(map(float, SCALES), key=loss)) * centroids, np.zeros(len(centroids), np.float32))


def learned(centroids: Vectors, queries: Vectors, lists: Ids, epochs: int = EPOCHS, seed: int = 0) -> Predictor:
    """A predictor for queries like these (n, d), of which `lists` (n, k) are the lists of their k best rows.

    Leave zero vectors out, and give no list as -1. Learning begins at `scaled` and lessens the cross entropy by Adam;
    an epoch takes 4 * n * lists * d floating point operations. Equal arguments give equal results.
    """
    start = scaled(centroids, queries[:BATCH], lists[:BATCH]).array
    weights = start.copy()
    mean, square = np.zeros_like(weights), np.zeros_like(weights)
    rng, steps, step = np.random.default_rng(seed), epochs * -(-len(queries) // BATCH), 0
    for _ in range(epochs):
        order = rng.permutation(len(queries))
        for batch in (order[low : low + BATCH] for low in range(0, len(order), BATCH)):
            step += 1
            some = np.hstack([queries[batch], np.ones((len(batch), 1), np.float32)])
            errors = _softmax(some @ weights.T)
            np.subtract.at(errors, (np.arange(len(batch))[:, None], lists[batch]), np.float32(1 / lists.shape[1]))
            gradient = errors.T @ some / np.float32(len(batch))
            mean += (1 - MOMENTUM) * (gradient - mean)
            square += (1 - VARIANCE) * (gradient * gradient - square)
            rate = RATE * (1 - step / steps) / (1 - MOMENTUM**step)
            weights -= rate * mean / (np.sqrt(square / (1 - VARIANCE**step)) + TINY)
    return Predictor.of_array(start + np.float32(KEPT) * (weights - start))


def _softmax(scores: Vectors) -> Vectors:
    """The softmax of each row, in place."""
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    return scores
