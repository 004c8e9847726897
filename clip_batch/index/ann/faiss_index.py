"""The vector index: trained, filled, saved, searched. faiss lies behind this module and the three it rests on.

An index is trained once, empty (the template); each index shard is a copy of the template, filled.
Metric: inner product, which for unit vectors is the cosine. Nothing here changes an index while it
is searched: nprobe, efSearch and removed rows travel with the request as faiss SearchParameters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_batch.errors import ConfigError, CorruptError, one_line
from clip_batch.index.ann import ondisk
from clip_batch.index.ann.footprint import code_bytes as code_bytes
from clip_batch.index.ann.footprint import template_bytes as template_bytes
from clip_batch.index.ann.libfaiss import Index as Index
from clip_batch.index.ann.libfaiss import inner, innermost, key_errors, load, make
from clip_batch.index.ann.libfaiss import openblas_core as openblas_core
from clip_batch.index.ann.ondisk import join as join
from clip_batch.index.ann.order import best

if TYPE_CHECKING:
    import numpy.typing as npt

    from clip_batch.index.ann.libfaiss import Ids, Vectors

REFINE_FACTOR = 10
"""A key that re-ranks (`...,RFlat`) re-ranks this many times k candidates."""

MOST_PROBES = 4096
MOST_EF_SEARCH = 1024

FIRST_DEPTH = 4096
"""Of a search for all rows over a threshold, in a kind of index that does not look for these."""

DEEP = 10_000
"""Hits from which it is cheaper to take all that a search looks at, and put it in order, than faiss's own choice."""

_FEW = 4
"""Times as many rows as hits that a deep search may look at: it holds them all."""


def choose_key(rows: int, dim: int, max_memory: int, flat_rows: int) -> str:
    """The key for `rows` vectors: "Flat" up to `flat_rows`, above that autofaiss's choice.

    `max_memory` (bytes) is what the index may take when served. ConfigError if nothing fits, or without autofaiss.
    """
    if rows <= flat_rows:
        return "Flat"
    import logging

    load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from autofaiss.external.optimize import get_optimal_index_keys_v2
        except ImportError as error:
            raise ConfigError(
                f"--index-key auto for {rows:,} rows is autofaiss's choice, and autofaiss is not installed, as "
                "clip-batch[merge] brings it up to Python 3.12 alone: give --index-key; clip-batch sweep recommends one"
            ) from error
    logging.getLogger("autofaiss").setLevel(logging.ERROR)
    keys = get_optimal_index_keys_v2(rows, dim, f"{max_memory}B", should_be_memory_mappable=True)
    if not keys:
        raise ConfigError(f"no index of {rows:,} vectors of {dim} fits in {max_memory:,} bytes: raise --max-memory")
    return str(keys[0])


def lists(key: str) -> int:
    """Inverted lists that a key asks for; 0 where it has none."""
    found = re.search(r"IVF(\d+)([kM]?)", key)
    return int(found[1]) * {"": 1, "k": 2**10, "M": 2**20}[found[2]] if found else 0


def train(key: str, vectors: Vectors, seed: int = 0) -> Index:
    """An empty index of a key, trained on vectors (n, d). ConfigError: faiss refuses the key or the sample."""
    faiss = load()
    index = make(key, vectors.shape[1])
    # Without these limits of 1 faiss writes warnings on stderr by itself.
    if (ivf := faiss.try_extract_index_ivf(index)) is not None:
        ivf.cp.seed = seed
        ivf.cp.min_points_per_centroid = 1
    if hasattr(codes := innermost(index), "pq"):
        codes.pq.cp.min_points_per_centroid = 1
    with key_errors(f"index key {key!r} on {len(vectors):,} training vectors of {vectors.shape[1]}"):
        index.train(vectors)
    return index


def cluster(vectors: Vectors, count: int, seed: int = 0) -> Vectors:
    """Centroids (count, d) of a small spherical k-means, to order the rows of an index without lists."""
    faiss = load()
    kmeans = faiss.Kmeans(vectors.shape[1], count, niter=10, spherical=True, seed=seed, min_points_per_centroid=1)
    kmeans.train(vectors)
    centroids: Vectors = kmeans.centroids
    return centroids


def assign(index: Index, vectors: Vectors) -> Ids:
    """The inverted list (n,) of each vector (n, d), by the index's coarse quantizer after its transforms."""
    faiss = load()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        for i in range(index.chain.size()):
            vectors = index.chain.at(i).apply(vectors)
        return assign(index.index, vectors)
    if (within := inner(index)) is not None:
        return assign(within, vectors)
    found: Ids = index.quantizer.search(vectors, 1)[1][:, 0]
    return found


def assign_nearest(centroids: Vectors, vectors: Vectors) -> Ids:
    """The centroid (n,) of largest inner product with each vector."""
    return nearest(vectors, centroids, 1)[1][:, 0]


def has_lists(index: Index) -> bool:
    """True for an index with inverted lists."""
    return load().try_extract_index_ivf(index) is not None


def with_ids(index: Index) -> Index:
    """An index that takes explicit ids: itself where its kind stores ids, else wrapped in an id map."""
    return index if _stores_ids(index) else load().IndexIDMap2(index)


def _stores_ids(index: Index) -> bool:
    faiss = load()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _stores_ids(index.index)
    return isinstance(index, (faiss.IndexIVF, faiss.IndexIDMap))


def add(index: Index, vectors: Vectors, ids: Ids, lists: Ids | None = None) -> None:
    """Add vectors (n, d). An index that stores no ids numbers them itself, from its own ntotal.

    `lists` (n,) are what `assign` said of them: only these lists are compared again, where they are known.
    """
    with _few_lists(index, np.unique(lists)) if lists is not None else nullcontext():
        if _stores_ids(index):
            index.add_with_ids(vectors, ids)
        else:
            index.add(vectors)


@contextmanager
def _few_lists(index: Index, lists: Ids) -> Iterator[None]:
    """The index with a quantizer of these lists alone: vectors go into the nearest of them."""
    faiss = load()
    ivf = faiss.try_extract_index_ivf(index)
    whole = ivf.quantizer
    few = faiss.IndexIDMap2(faiss.IndexFlat(whole.d, whole.metric_type))
    few.add_with_ids(whole.reconstruct_batch(lists), lists)
    ivf.quantizer = few
    try:
        yield
    finally:
        ivf.quantizer = whole


def efforts(index: Index) -> list[int]:
    """The efforts worth trying, ascending: nprobe, or efSearch; [] where there is nothing to tune."""
    faiss = load()
    codes = innermost(index)
    if isinstance(codes, faiss.IndexIVF):
        most = min(codes.nlist, MOST_PROBES)
        return [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
    if isinstance(codes, faiss.IndexHNSW):
        return [2**i for i in range(4, MOST_EF_SEARCH.bit_length())]
    return []


@dataclass(frozen=True)
class Removed:
    """Rows that a search must not find: local ids (n,), sorted. Worth keeping: it makes its bitmap once."""

    ids: Ids

    @cached_property
    def selector(self) -> Any:
        """faiss's test of an id: true where the row is still there."""
        bits = np.zeros(int(self.ids[-1]) // 8 + 1 if len(self.ids) else 1, dtype=np.uint8)
        np.bitwise_or.at(bits, self.ids >> 3, (1 << (self.ids & 7)).astype(np.uint8))
        return load().IDSelectorNot(load().IDSelectorBitmap(bits))  # each keeps what it is made of

    def has(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which of some ids are removed."""
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        found: npt.NDArray[np.bool_] = self.ids[places] == ids
        return found


def _parameters(index: Index, effort: int | None, selector: Any = None) -> Any:
    """faiss's SearchParameters, wrapped as the index is; None where nothing can be set. No effort: the index's own."""
    faiss = load()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        within = _parameters(index.index, effort, selector)
        return within and faiss.SearchParametersPreTransform(index_params=within)
    if isinstance(index, faiss.IndexIDMap):  # which would translate the outermost parameters' selector only
        return _parameters(index.index, effort, selector and faiss.IDSelectorTranslated(index.id_map, selector))
    if isinstance(index, faiss.IndexRefine):
        within = _parameters(index.base_index, effort, selector)
        return faiss.IndexRefineSearchParameters(k_factor=REFINE_FACTOR, base_index_params=within)
    some = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=min(effort or index.nprobe, index.nlist), **some)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=effort or index.hnsw.efSearch, **some)
    return faiss.SearchParameters(**some) if some else None


def _selects(index: Index) -> bool:
    """Whether this kind of index can leave rows out while it searches."""
    faiss = load()
    kinds = faiss.IndexIVF, faiss.IndexHNSW, faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexRaBitQ
    return isinstance(innermost(index), kinds)


def search(
    index: Index, queries: Vectors, k: int, effort: int | None = None, removed: Ids | Removed | None = None
) -> tuple[Vectors, Ids]:
    """The k best of each query (n, d): scores (n, k) descending and ids (n, k), -1 where there are fewer.

    Rows of `removed` (sorted ids) are not found. Where many are, HNSW finds less at the same effort.
    """
    gone = Removed(removed) if isinstance(removed, np.ndarray) else removed
    if gone is None or not len(gone.ids):
        gone = None
    elif not _selects(index):
        return _search_past(gone, index, queries, k, k + min(k, len(gone.ids)), effort)
    parameters = _parameters(index, effort, gone and gone.selector)
    if k >= DEEP and _looked_at(index, effort) <= _FEW * k:
        found = [best(*_over(index, query, -np.inf, parameters), k) for query in queries[:, None]]
        return np.concatenate([scores for scores, _ in found]), np.concatenate([ids for _, ids in found])
    scores, ids = index.search(queries, k, params=parameters)
    return scores, ids


def _looked_at(index: Index, effort: int | None) -> float:
    """Rows that a search looks at, as far as one can say; infinity if not all of them can be had."""
    faiss = load()
    index = faiss.downcast_index(index)
    if isinstance(index, (faiss.IndexPreTransform, faiss.IndexIDMap)):
        return _looked_at(index.index, effort)
    # Those of RaBitQ leave out rows that a search for the best finds, or score them otherwise.
    kinds = faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ, faiss.IndexIVFPQFastScan
    if not isinstance(index, kinds):
        return float("inf")
    return float(index.ntotal * min(effort or index.nprobe, index.nlist) / index.nlist)


def _over(index: Index, query: Vectors, threshold: float, parameters: Any) -> tuple[Vectors, Ids]:
    """All that a search for one query (1, d) looks at and that scores `threshold` or more: (1, n), in no order."""
    least = np.finfo(np.float32).min
    below = max(np.nextafter(np.float32(threshold), np.float32(-np.inf)), least)  # faiss takes what is above
    _, scores, ids = index.range_search(query, float(below), params=parameters)
    return scores[None], ids[None]


def _search_past(
    gone: Removed, index: Index, queries: Vectors, k: int, depth: int, effort: int | None
) -> tuple[Vectors, Ids]:
    """Search so deep that k rows are left of what is found, or no more are to be found."""
    scores, ids = search(index, queries, depth, effort)
    alive = (ids >= 0) & ~gone.has(ids)
    first = np.argsort(~alive, axis=1, kind="stable")[:, :k]
    alive = np.take_along_axis(alive, first, 1)
    scores = np.where(alive, np.take_along_axis(scores, first, 1), np.float32(-np.inf))
    ids = np.where(alive, np.take_along_axis(ids, first, 1), -1)
    most = min(k + len(gone.ids), index.ntotal)
    short = np.flatnonzero(~alive.all(axis=1))
    if len(short) and depth < most:
        scores[short], ids[short] = _search_past(gone, index, queries[short], k, min(4 * depth, most), effort)
    return scores, ids


def search_over(
    index: Index, query: Vectors, threshold: float, effort: int | None = None, removed: Removed | None = None
) -> tuple[Vectors, Ids]:
    """The rows of a query (1, d) that score `threshold` or more: scores (n,) and ids (n,), by ascending id.

    In a kind of index that does not look for these, by ever deeper searches.
    """
    if _looked_at(index, effort) < float("inf"):
        selector = removed.selector if removed and len(removed.ids) else None
        scores, ids = _over(index, query, threshold, _parameters(index, effort, selector))
    else:
        scores, ids = _search_over(index, query, threshold, effort, removed)
    order = np.argsort(ids[0])
    return scores[0, order], ids[0, order]


def _search_over(
    index: Index, query: Vectors, threshold: float, effort: int | None, removed: Removed | None
) -> tuple[Vectors, Ids]:
    depth = min(FIRST_DEPTH, index.ntotal)
    while True:
        scores, ids = search(index, query, max(depth, 1), effort, removed)
        found = int(np.count_nonzero((ids[0] >= 0) & (scores[0] >= threshold)))
        if found < depth or depth >= index.ntotal:
            return scores[:, :found], ids[:, :found]
        depth = min(8 * depth, index.ntotal)


def nearest(queries: Vectors, vectors: Vectors, k: int) -> tuple[Vectors, Ids]:
    """Exact search of vectors (m, d): scores and row numbers (n, min(k, m)), descending."""
    faiss = load()
    scores, ids = faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
    return scores, ids


def write(index: Index, path: str) -> None:
    """Save an index as a plain faiss file."""
    load().write_index(index, path)


def read(path: str, mapped: bool = False) -> Index:
    """Load an index; `mapped` leaves its codes on disk, in the page cache, and so does one that `join` wrote.

    CorruptError if faiss cannot read it.
    """
    faiss = load()
    try:
        if ondisk.is_joined(path):
            return ondisk.open_joined(path)
        return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        reason = one_line(error)[-120:]
        raise CorruptError(f"{path} is not a readable faiss index ({reason}): delete it and merge again") from None


def use_threads(count: int) -> None:
    """Threads that faiss may use for what the calling thread asks of it."""
    load().omp_set_num_threads(count)


def prepare_reconstruct(index: Index) -> None:
    """Make ids addressable in an index with lists (8 bytes or more a vector, once)."""
    faiss = load()
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and ivf.direct_map.type == faiss.DirectMap.NoMap:
        ivf.set_direct_map_type(faiss.DirectMap.Hashtable)
    if isinstance(codes := innermost(index), faiss.IndexIVFPQFastScan):
        codes.fine_quantizer = codes.pq  # which faiss 1.15 forgets when it reads one, and then crashes


def reconstruct(index: Index, row: int) -> Vectors | None:
    """The vector (d,) of an id, as exact as the index stores it; None where the id is not in it.

    Call `prepare_reconstruct` first. ConfigError: this kind of index cannot.
    """
    try:
        vector: Vectors = index.reconstruct(row)
    except RuntimeError as error:
        if "not found" in str(error):
            return None
        raise ConfigError(f"an index of kind {type(index).__name__} cannot give vectors back: embed again") from None
    return vector
