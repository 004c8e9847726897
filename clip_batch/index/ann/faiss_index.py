"""A faiss index: trained, filled, saved, read, and asked for its vectors. faiss is only used in this folder.

An index is trained once, empty (the template); each index shard is a copy of the template, filled.
The metric is the inner product, which for unit vectors is the cosine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from clip_batch.errors import ConfigError, CorruptError, one_line
from clip_batch.index.ann import ondisk
from clip_batch.index.ann.faiss_search import nearest
from clip_batch.index.ann.libfaiss import Index, inner, innermost, key_errors, load, make

if TYPE_CHECKING:
    from clip_batch.index.ann.libfaiss import Ids, Vectors

MOST_PROBES = 4096
MOST_EF_SEARCH = 1024


def train(index_key: str, vectors: Vectors, seed: int = 0) -> Index:
    """An empty index, trained on vectors (n, d). ConfigError: faiss refuses the index key or the sample."""
    faiss = load()
    index = make(index_key, vectors.shape[1])
    # Without these limits of 1 faiss writes warnings on stderr by itself.
    if (ivf := faiss.try_extract_index_ivf(index)) is not None:
        ivf.cp.seed = seed
        ivf.cp.min_points_per_centroid = 1
    if hasattr(codes := innermost(index), "pq"):
        codes.pq.cp.min_points_per_centroid = 1
    with key_errors(f"index key {index_key!r} on {len(vectors):,} training vectors of {vectors.shape[1]}"):
        index.train(vectors)
    return index


def cluster(vectors: Vectors, count: int, seed: int = 0) -> Vectors:
    """Centroids (count, d) of a spherical k-means of a few rounds, to order the rows of an index without lists."""
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
    lists: Ids = index.quantizer.search(vectors, 1)[1][:, 0]
    return lists


def assign_nearest(centroids: Vectors, vectors: Vectors) -> Ids:
    """The centroid (n,) of largest inner product with each vector."""
    return nearest(vectors, centroids, 1)[1][:, 0]


def has_lists(index: Index) -> bool:
    """Whether an index has inverted lists."""
    return load().try_extract_index_ivf(index) is not None


def with_ids(index: Index) -> Index:
    """The index, wrapped in an id map unless its kind stores ids."""
    return index if _stores_ids(index) else load().IndexIDMap2(index)


def _stores_ids(index: Index) -> bool:
    faiss = load()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _stores_ids(index.index)
    return isinstance(index, (faiss.IndexIVF, faiss.IndexIDMap))


def add(index: Index, vectors: Vectors, ids: Ids, lists: Ids | None = None) -> None:
    """Add vectors (n, d). An index that stores no ids numbers them itself, from its own ntotal.

    `lists` (n,) are those that `assign` gave them, where they are known: faiss then compares with these lists alone.
    """
    with _few_lists(index, np.unique(lists)) if lists is not None else nullcontext():
        if _stores_ids(index):
            index.add_with_ids(vectors, ids)
        else:
            index.add(vectors)


@contextmanager
def _few_lists(index: Index, lists: Ids) -> Iterator[None]:
    """Give the index, for a while, a quantizer of these lists alone: vectors go into the nearest of them."""
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
    """The values of nprobe or efSearch that are worth trying, ascending; [] where there is nothing to tune."""
    faiss = load()
    codes = innermost(index)
    if isinstance(codes, faiss.IndexIVF):
        most = min(codes.nlist, MOST_PROBES)
        return [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
    if isinstance(codes, faiss.IndexHNSW):
        return [2**i for i in range(4, MOST_EF_SEARCH.bit_length())]
    return []


def write(index: Index, path: str) -> None:
    """Save an index as a plain faiss file."""
    load().write_index(index, path)


def read(path: str, mapped: bool = False) -> Index:
    """Read an index file; with `mapped`, or if `ondisk.join` wrote it, its codes are memory-mapped.

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
    """Set the number of threads that faiss uses for calls of the calling thread."""
    load().omp_set_num_threads(count)


def prepare_reconstruct(index: Index) -> None:
    """Prepare an index with lists for `reconstruct`: a table of ids, 8 bytes or more a vector."""
    faiss = load()
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and ivf.direct_map.type == faiss.DirectMap.NoMap:
        ivf.set_direct_map_type(faiss.DirectMap.Hashtable)
    if isinstance(codes := innermost(index), faiss.IndexIVFPQFastScan):
        codes.fine_quantizer = codes.pq  # faiss 1.15 does not set it when it reads such an index, and crashes


def reconstruct(index: Index, row: int) -> Vectors | None:
    """The vector (d,) of an id, as exact as the index stores it; None if the index does not have the id.

    Call `prepare_reconstruct` first. ConfigError: this kind of index cannot give vectors back.
    """
    try:
        vector: Vectors = index.reconstruct(row)
    except RuntimeError as error:
        if "not found" in str(error):
            return None
        raise ConfigError(f"an index of kind {type(index).__name__} cannot give vectors back: embed again") from None
    return vector
