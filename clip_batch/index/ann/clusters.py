"""k-means for many centroids and many vectors: trained by groups, and the nearest centroid found by way of groups.

With c centroids a vector is compared with some multiple of sqrt(c) of them instead of all. The groups are clusters of
the vectors when the centroids are trained, and of the centroids when vectors are assigned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from clip_batch.encoders.device import cores
from clip_batch.index.ann import gpu
from clip_batch.index.ann.libfaiss import load

if TYPE_CHECKING:
    from clip_batch.index.ann.libfaiss import Ids, Index, Vectors

FLAT = 1024
"""Centroids up to which every vector is compared with all: no slower there (10.5 microseconds a vector of 512)."""

KEPT = 0.99
"""The share of the centroids' variance in which vectors are compared with them (see docs/experiments.md)."""

WORTH = 0.6
"""The share of the dimensions up to which fewer of them are worth a rotation."""

ROUNDS = 10
"""Rounds of each k-means."""

GROUP_SAMPLE = 256
"""Vectors for each group that the groups are trained on."""

NEAR = 8
"""Groups whose centroids a vector is compared with: 97 of 100 vectors get the nearest of 4,096 centroids."""

BLOCK = 8192
"""Vectors that one thread assigns at a time."""


def train(vectors: Vectors, count: int, seed: int = 0) -> Vectors:
    """Unit centroids (count, d) of vectors (n, d), of which there are `count` or more, by the cosine.

    Up to `FLAT // 4` centroids this is a plain k-means. Of more, the vectors are split into about sqrt(count) groups,
    each group is clustered by itself, and one last round runs over all vectors, for those at the groups' borders.
    """
    if count <= FLAT // 4:
        return _kmeans(vectors, count, seed)
    groups = round(count**0.5)
    own = nearest_of(_kmeans(vectors[: groups * GROUP_SAMPLE], groups, seed))(vectors)
    order, ends = _by_number(own, groups)
    members = [vectors[order[low:high]] for low, high in zip(ends, ends[1:], strict=False)]
    shares = _shares(np.diff(ends), count)
    parts = [_kmeans(part, share, seed) for part, share in zip(members, shares, strict=True) if share]
    return _averaged(np.concatenate(parts), vectors, seed)


def nearest_of(centroids: Vectors) -> Callable[[Vectors], Ids]:
    """A function that gives each vector (n, d) the centroid (n,) of largest inner product, nearly always.

    Both are compared in the few dimensions in which centroids differ (see `axes_of`); up to `FLAT` centroids, and on a
    GPU, with all of them, otherwise by `Groups.assign`.
    """
    some = some_nearest_of(centroids, 1)
    return lambda vectors: some(vectors)[:, 0]


def some_nearest_of(centroids: Vectors, count: int) -> Callable[[Vectors], Ids]:
    """As `nearest_of`, a function that gives the `count` nearest centroids (n, count), the nearest first.

    There are fewer columns where there are fewer centroids.
    """
    axes, count = axes_of(centroids), min(count, len(centroids))

    def reduced(vectors: Vectors) -> Vectors:
        return vectors if axes is None else vectors @ axes

    if len(centroids) > FLAT and not gpu.count():
        groups = grouped(reduced(centroids))
        if count == 1:
            return lambda vectors: groups.assign(reduced(vectors))[:, None]
        return lambda vectors: groups.assign_some(reduced(vectors), count)
    index = gpu.moved(_flat(reduced(centroids)))

    def search(vectors: Vectors) -> Ids:
        ids: Ids = index.search(reduced(vectors), count)[1]
        return ids

    return search


def axes_of(centroids: Vectors) -> Vectors | None:
    """Orthogonal axes (d, m) that keep `KEPT` of the variance of centroids (c, d); None where m would be near d.

    What is left hardly tells centroids apart, and their common mean does not: its score is the same for all.
    """
    spread = centroids - centroids.mean(axis=0)
    values, axes = np.linalg.eigh(spread.T @ spread)
    kept = np.cumsum(values[::-1]) / max(float(values.sum()), np.finfo(np.float32).tiny)
    count = min(len(values), int(np.searchsorted(kept, KEPT)) + 1)
    if count > len(values) * WORTH:
        return None
    return np.ascontiguousarray(axes[:, ::-1][:, :count], dtype=np.float32)


@dataclass(frozen=True)
class Groups:
    """Centroids in groups: `tops` (g, d) are the groups' centroids; each group has its members' numbers and vectors."""

    tops: Vectors
    members: tuple[Ids, ...]
    vectors: tuple[Vectors, ...]

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        """The threads that assign; they end with the groups."""
        return ThreadPoolExecutor(cores(), "assign")

    def assign(self, vectors: Vectors) -> Ids:
        """The centroid (n,) of largest inner product among those of the `NEAR` groups nearest to each vector (n, d)."""
        found = self._pool.map(self._assign, (vectors[low : low + BLOCK] for low in range(0, len(vectors), BLOCK)))
        return np.concatenate([np.empty(0, dtype=np.int64), *found])

    def assign_some(self, vectors: Vectors, count: int) -> Ids:
        """The `count` centroids (n, count) of largest inner product among those of the same groups, best first.

        -1 where these groups have fewer.
        """
        blocks = (vectors[low : low + BLOCK] for low in range(0, len(vectors), BLOCK))
        found = self._pool.map(lambda block: self._assign_some(block, count), blocks)
        return np.concatenate([np.empty((0, count), dtype=np.int64), *found])

    def _assign_some(self, vectors: Vectors, count: int) -> Ids:
        best = np.full((len(vectors), count), -np.inf, dtype=np.float32)
        ids = np.full((len(vectors), count), -1, dtype=np.int64)
        for group, rows in self._near_groups(vectors):
            members = np.broadcast_to(self.members[group], (len(rows), len(self.members[group])))
            scores = np.hstack([best[rows], vectors[rows] @ self.vectors[group].T])
            order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
            best[rows] = np.take_along_axis(scores, order, 1)
            ids[rows] = np.take_along_axis(np.hstack([ids[rows], members]), order, 1)
        return ids

    def _near_groups(self, vectors: Vectors) -> Iterator[tuple[int, Ids]]:
        """Each group, and the vectors (their numbers) that it is among the `NEAR` nearest of."""
        near = min(NEAR, len(self.tops))
        groups = np.argpartition(-(vectors @ self.tops.T), near - 1, axis=1)[:, :near]
        order, ends = _by_number(groups.reshape(-1), len(self.tops))
        for group, (low, high) in enumerate(zip(ends, ends[1:], strict=False)):
            yield group, order[low:high] // near

    def _assign(self, vectors: Vectors) -> Ids:
        best, ids = np.full(len(vectors), -np.inf, dtype=np.float32), np.zeros(len(vectors), dtype=np.int64)
        for group, rows in self._near_groups(vectors):
            scores = vectors[rows] @ self.vectors[group].T
            places = scores.argmax(axis=1)
            top = scores[np.arange(len(rows)), places]
            better = top > best[rows]
            best[rows[better]], ids[rows[better]] = top[better], self.members[group][places[better]]
        return ids


def grouped(centroids: Vectors, seed: int = 0) -> Groups:
    """The centroids (c, d) in about sqrt(c) groups, none of them empty."""
    tops = _kmeans(centroids, max(1, round(len(centroids) ** 0.5)), seed)
    order, ends = _by_number(nearest_of(tops)(centroids), len(tops))
    members = [order[low:high] for low, high in zip(ends, ends[1:], strict=False)]
    kept = [group for group, ids in enumerate(members) if len(ids)]
    return Groups(
        tops[kept], tuple(members[group] for group in kept), tuple(centroids[members[group]] for group in kept)
    )


def _kmeans(vectors: Vectors, count: int, seed: int) -> Vectors:
    faiss = load()
    options = {"seed": seed, "min_points_per_centroid": 1, "max_points_per_centroid": max(256, len(vectors))}
    kmeans = faiss.Kmeans(vectors.shape[1], count, niter=ROUNDS, spherical=True, gpu=gpu.count() > 0, **options)
    kmeans.train(np.ascontiguousarray(vectors))
    centroids: Vectors = kmeans.centroids
    return centroids


def _flat(centroids: Vectors) -> Index:
    index = load().IndexFlatIP(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids))
    return index


def _by_number(numbers: Ids, count: int) -> tuple[Ids, Ids]:
    """The places of `numbers` (n,) in their order, stable, and where each number below `count` begins (count + 1,)."""
    order: Ids = np.argsort(numbers, kind="stable")
    return order, np.searchsorted(numbers[order], np.arange(count + 1))


def _shares(sizes: Ids, count: int) -> list[int]:
    """How many of `count` centroids each group gets: in proportion to its size, none more than it has vectors."""
    exact = sizes / sizes.sum() * count
    shares = np.where(sizes > 0, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
    while (short := count - int(shares.sum())) != 0:
        step = 1 if short > 0 else -1
        free = shares < sizes if short > 0 else shares > 1
        shares[np.argmax(np.where(free, step * (exact - shares), -np.inf))] += step
    return [int(share) for share in shares]


def _averaged(centroids: Vectors, vectors: Vectors, seed: int) -> Vectors:
    """The centroids after one round of k-means over all vectors; one without vectors stays."""
    order, ends = _by_number(grouped(centroids, seed).assign(vectors), len(centroids))
    sums = centroids.copy()
    for number in np.flatnonzero(np.diff(ends)):
        sums[number] = vectors[order[ends[number] : ends[number + 1]]].sum(axis=0)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(norms > 0, sums / np.maximum(norms, np.finfo(np.float32).tiny), centroids).astype(np.float32)
