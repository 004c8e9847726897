"""Searches index shards that are copies of one template: a query is assigned to inverted lists once for all shards.

Like `faiss_search`, nothing here changes an index. The calls go past faiss's Python wrappers, which take longer than a
small search and cannot pass SearchParameters with an assignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_batch.index.ann import predictor as predictors
from clip_batch.index.ann.faiss_search import Excluded, quantizer_parameters
from clip_batch.index.ann.libfaiss import Index, load

if TYPE_CHECKING:
    from clip_batch.index.ann.libfaiss import Ids, Vectors
    from clip_batch.index.ann.predictor import Predictor

_COMPARED = 8
"""Centroids of each shard that are compared with the first shard's, evenly spaced."""


@dataclass(frozen=True)
class SharedLists:
    """Shards with the same transforms and the same coarse quantizer, which are the first shard's.

    `inverted` has the IndexIVF of each shard. `bytes_per_list` is the average size of a list's codes, in all shards.
    """

    transforms: tuple[Any, ...]
    quantizer: Any
    inverted: tuple[Any, ...]
    bytes_per_list: float

    @cached_property
    def centroids(self) -> Vectors:
        """The centroids (lists, d). RuntimeError: the coarse quantizer gives none back."""
        centroids: Vectors = self.quantizer.reconstruct_n(0, self.inverted[0].nlist)
        return centroids

    def transformed(self, vectors: Vectors) -> Vectors:
        """Vectors float32 (n, d) as the coarse quantizer gets them."""
        return _transformed(self.transforms, vectors)

    def probes(self, effort: int | None) -> int:
        """The number of lists that a search visits: nprobe, by default the index's own."""
        return int(min(effort or self.inverted[0].nprobe, self.inverted[0].nlist))


@dataclass(frozen=True)
class Probe:
    """Queries float32 (n, d) after the transforms, the lists (n, nprobe) to visit, and their centroids' scores.

    A list of -1 is passed over.
    """

    queries: Vectors
    lists: Ids
    scores: Vectors


def share(indices: Sequence[Index]) -> SharedLists | None:
    """What index shards share; None if they are no inverted files behind transforms, or not copies of one template."""
    faiss = load()
    parts = [_unwrapped(index) for index in indices]
    if not parts or any(not isinstance(inverted, faiss.IndexIVF) for _, inverted in parts):
        return None
    (transforms, first), *others = parts
    if others and not all(_alike(transforms, first, *other) for other in others):
        return None
    inverted = tuple(part for _, part in parts)
    size = sum(part.ntotal for part in inverted) * first.code_size / first.nlist
    return SharedLists(transforms, first.quantizer, inverted, size)


def probe(
    shared: SharedLists, queries: Vectors, effort: int | None = None, predictor: Predictor | None = None
) -> Probe:
    """Assign queries float32 (n, d) to the lists that a search at this effort visits.

    These are the lists of the `effort` (nprobe) nearest centroids; with a predictor those of `predictor.visits`, unless
    the effort is all lists.
    """
    queries = shared.transformed(queries)
    nprobe = shared.probes(effort)
    if predictor is not None and nprobe < len(predictor.bias):
        lists = predictors.visits(predictor, queries, nprobe)
        return Probe(queries, lists, _scores(shared.centroids, queries, lists))
    scores, lists = shared.quantizer.search(queries, nprobe, params=quantizer_parameters(shared.quantizer, nprobe))
    return Probe(queries, lists, scores)


def _scores(centroids: Vectors, queries: Vectors, lists: Ids) -> Vectors:
    """The inner products (n, m) of queries (n, d) with the centroids of their lists (n, m)."""
    if len(queries) == 1:
        few: Vectors = (centroids[lists[0]] @ queries[0])[None]
        return few
    return np.take_along_axis(queries @ centroids.T, np.maximum(lists, 0), 1)


def parameters(probed: Probe, removed: Excluded | None = None) -> Any:
    """faiss's SearchParameters of a probe; shards without removed rows can share them."""
    made = load().SearchParametersIVF(nprobe=probed.lists.shape[1])
    if removed is not None and removed.count:
        made.sel = removed.selector
    return made


def search(shared: SharedLists, shard: int, probed: Probe, k: int, parameters: Any) -> tuple[Vectors, Ids]:
    """The k best rows of a shard for each query, as `faiss_search.search` finds them without the shared probe."""
    pointer, count = load().swig_ptr, len(probed.queries)
    scores, ids = np.empty((count, k), np.float32), np.empty((count, k), np.int64)
    vectors, lists, centroids = pointer(probed.queries), pointer(probed.lists), pointer(probed.scores)
    shared.inverted[shard].search_preassigned_c(
        count, vectors, k, lists, centroids, pointer(scores), pointer(ids), False, parameters
    )
    return scores, ids


def _unwrapped(index: Index) -> tuple[tuple[Any, ...], Index]:
    """The transforms of an index, and the index behind them."""
    faiss = load()
    index, transforms = faiss.downcast_index(index), []
    while isinstance(index, faiss.IndexPreTransform):
        transforms += [index.chain.at(number) for number in range(index.chain.size())]
        index = faiss.downcast_index(index.index)
    return tuple(transforms), index


def _transformed(transforms: Sequence[Any], vectors: Vectors) -> Vectors:
    for transform in transforms:
        vectors = transform.apply(vectors)
    return vectors


def _alike(transforms: Sequence[Any], first: Index, others: Sequence[Any], inverted: Index) -> bool:
    """Whether two shards look like copies of one template, by their shape, some centroids, and a transformed vector."""

    def shape(part: Index) -> tuple[Any, ...]:
        return type(part), part.d, part.nlist, part.code_size, type(part.quantizer), part.quantizer.ntotal

    if shape(first) != shape(inverted) or [each.d_in for each in transforms] != [each.d_in for each in others]:
        return False
    vector = np.ones((1, transforms[0].d_in if transforms else first.d), np.float32)
    if not np.array_equal(_transformed(transforms, vector), _transformed(others, vector)):
        return False
    try:
        return all(
            np.array_equal(first.quantizer.reconstruct(number), inverted.quantizer.reconstruct(number))
            for number in np.linspace(0, first.nlist - 1, _COMPARED).astype(int).tolist()
        )
    except RuntimeError:  # a quantizer that gives no centroids back
        return False
