"""A faiss index: trained, filled, saved, read, and asked for its vectors. faiss is only used in this folder.

An index is trained once, empty (the template); each index shard is a copy of the template, filled.
The metric is the inner product, which for unit vectors is the cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from clip_batch.errors import ConfigError, CorruptError, one_line
from clip_batch.index.ann import clusters, ondisk
from clip_batch.index.ann.libfaiss import Index, inner, innermost, key_errors, load, make

if TYPE_CHECKING:
    from clip_batch.index.ann.libfaiss import Ids, Vectors

MOST_PROBES = 4096
MOST_EF_SEARCH = 1024

FEW_BITS = 4
"""Bits of a product quantizer's codes up to which one thread trains it: its k-means are so small that threads wait."""

TRAINS_ALONE = 1
"""faiss's code for a coarse quantizer that makes its centroids itself, such as a multi-index (IMI2x8)."""


def train(index_key: str, vectors: Vectors, seed: int = 0, centroids: Vectors | None = None) -> Index:
    """An empty index, trained on vectors (n, d). ConfigError: faiss refuses the index key or the sample.

    `centroids` (lists, d) are those of the vectors, if they are known, for a key that only rotates the vectors.
    """
    faiss = load()
    index = make(index_key, vectors.shape[1])
    if hasattr(codes := innermost(index), "pq"):
        codes.pq.cp.min_points_per_centroid = 1  # otherwise faiss writes warnings on stderr by itself
    with key_errors(f"index key {index_key!r} on {len(vectors):,} training vectors of {vectors.shape[1]}"):
        if (ivf := faiss.try_extract_index_ivf(index)) is not None:
            if len(vectors) < ivf.nlist:
                raise RuntimeError(f"its {ivf.nlist:,} lists need as many training vectors at least")
            ivf.cp.seed, ivf.cp.min_points_per_centroid = seed, 1
            if ivf.quantizer_trains_alone != TRAINS_ALONE:
                _place_lists(index, vectors, seed, centroids)
        with one_thread() if hasattr(codes, "pq") and codes.pq.nbits <= FEW_BITS else nullcontext():
            index.train(vectors)
    return index


def _place_lists(index: Index, vectors: Vectors, seed: int, centroids: Vectors | None) -> None:
    """Train the transforms of an index, and give its coarse quantizer the centroids of the transformed vectors.

    `centroids` are those of the vectors before, where they are known.
    """
    faiss = load()
    while not isinstance(index := faiss.downcast_index(index), faiss.IndexIVF):
        if isinstance(index, faiss.IndexPreTransform):
            for number in range(index.chain.size()):
                step = index.chain.at(number)
                if not step.is_trained:
                    step.train(vectors)
                vectors = step.apply(vectors)
                centroids = None if centroids is None else step.apply(centroids)
        index = inner(index)
    centroids = clusters.train(vectors, index.nlist, seed) if centroids is None else centroids
    if not index.quantizer.is_trained:
        index.quantizer.train(centroids)
    index.quantizer.add(centroids)


def assigner(index: Index) -> Callable[[Vectors], Ids]:
    """A function that gives each vector (n, d) its inverted list (n,), by the centroids of the index.

    Among many lists it is nearly always, not always, the nearest (see `clusters.Groups`).
    """
    some = some_assigner(index, 1)
    return lambda vectors: some(vectors)[:, 0]


def some_assigner(index: Index, count: int) -> Callable[[Vectors], Ids]:
    """As `assigner`, a function that gives the `count` nearest lists (n, count), a vector's own first.

    There are fewer columns where the index has fewer lists.
    """
    faiss, transforms, owner = load(), [], index
    while not isinstance(index := faiss.downcast_index(index), faiss.IndexIVF):
        if isinstance(index, faiss.IndexPreTransform):
            transforms += [index.chain.at(number) for number in range(index.chain.size())]
        index = inner(index)
    try:
        nearest = clusters.some_nearest_of(index.quantizer.reconstruct_n(0, index.nlist), count)
    except RuntimeError:  # a quantizer that gives no centroids back
        nearest = partial(_nearest_of, index.quantizer, min(count, index.nlist))

    def assign(vectors: Vectors, owner: Index = owner) -> Ids:  # faiss's parts do not keep their owner alive
        for step in transforms:
            vectors = step.apply(vectors)
        return nearest(vectors)

    return assign


def _nearest_of(quantizer: Index, count: int, vectors: Vectors) -> Ids:
    lists: Ids = quantizer.search(vectors, count)[1]
    return lists


def has_lists(index: Index) -> bool:
    """Whether an index has inverted lists."""
    return load().try_extract_index_ivf(index) is not None


def list_sizes(index: Index) -> Ids:
    """The number of rows in each inverted list (lists,)."""
    ivf = load().try_extract_index_ivf(index)
    return np.array([ivf.invlists.list_size(number) for number in range(ivf.nlist)])


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
        steps = [step for i in range(most.bit_length()) for step in (2**i, 3 * 2**i // 2)]
        return [*sorted({step for step in steps if step < most}), most]
    if isinstance(codes, faiss.IndexHNSW):
        return [2**i for i in range(4, MOST_EF_SEARCH.bit_length())]
    return []


def first_effort(index: Index) -> int | None:
    """The effort at which a search for the least one begins: a sixteenth of the lists; None: nothing to tune."""
    if not (known := efforts(index)):
        return None
    ivf = load().try_extract_index_ivf(index)
    wanted = known[len(known) // 2] if ivf is None else ivf.nlist / 16
    return min(known, key=lambda effort: abs(effort - wanted))


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


@contextmanager
def one_thread() -> Iterator[None]:
    """Let faiss use one thread for what the calling thread asks meanwhile."""
    threads = load().omp_get_max_threads()
    use_threads(1)
    try:
        yield
    finally:
        use_threads(threads)


def lists(index: Index) -> int | None:
    """The number of inverted lists of an index; None if it has none."""
    ivf = load().try_extract_index_ivf(index)
    return None if ivf is None else int(ivf.nlist)


def is_exact(index: Index) -> bool:
    """Whether an index keeps the float32 vectors that it was given."""
    faiss, codes = load(), innermost(index)
    kinds = faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexHNSWFlat
    return isinstance(codes, kinds) and not isinstance(faiss.downcast_index(index), faiss.IndexPreTransform)


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


def reconstruct_all(index: Index, rows: Ids) -> Vectors:
    """The vectors (n, d) of ids (n,) that the index has, as exact as it stores them; it prepares the index itself."""
    prepare_reconstruct(index)
    vectors: Vectors = index.reconstruct_batch(rows)
    return vectors
