"""The vector index: the only module that knows faiss and autofaiss.

An index is trained once, empty (the template); each index shard is a copy of the template, filled.
Metric: inner product, which for unit vectors is the cosine. Nothing here changes an index while it
is searched: nprobe and efSearch travel with the request as faiss SearchParameters.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from clip_batch.errors import ConfigError, CorruptError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.int64]

Index = Any
"""A faiss index (faiss has no type stubs)."""

REFINE_FACTOR = 10
"""A key that re-ranks (`...,RFlat`) re-ranks this many times k candidates."""

MOST_PROBES = 4096
MOST_EF_SEARCH = 1024


def openblas_core(cpuinfo: str) -> str | None:
    """OpenBLAS's name for the CPU that /proc/cpuinfo describes; None to leave it to OpenBLAS.

    The OpenBLAS inside faiss's wheel may take a new CPU for a very old one (5 times slower). The
    value comes from the CPU's own flags: forcing a kernel that it lacks would be an illegal instruction.
    """
    flags = set(re.findall(r"\S+", (re.findall(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE) or [""])[0]))
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"} <= flags:
        return "SkylakeX"
    if {"avx2", "fma"} <= flags:
        return "Zen" if "AuthenticAMD" in cpuinfo else "Haswell"
    return None


@functools.cache
def _faiss() -> Any:
    if platform.system() == "Linux" and platform.machine() == "x86_64" and "OPENBLAS_CORETYPE" not in os.environ:
        with open("/proc/cpuinfo") as file:
            if core := openblas_core(file.read()):
                os.environ["OPENBLAS_CORETYPE"] = core  # read once, when the library is loaded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SWIG's types and numpy's moved names: not ours to mend
        import faiss
    return faiss


@contextmanager
def _one_line(what: str, mend: str) -> Iterator[None]:
    """faiss's exceptions, with their C++ signatures, as one line."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^.*? at \S+?:\d+: (Error: )?", "", " ".join(str(error).split()))
        raise ConfigError(f"{what}: {reason}; {mend}") from None


def choose_key(rows: int, dim: int, max_memory: int, flat_rows: int) -> str:
    """The key for `rows` vectors: "Flat" up to `flat_rows`, above that autofaiss's choice.

    `max_memory` (bytes) is what the index may take when served. ConfigError if nothing fits.
    """
    if rows <= flat_rows:
        return "Flat"
    import logging

    _faiss()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from autofaiss.external.optimize import get_optimal_index_keys_v2
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
    faiss = _faiss()
    mend = "mend --index-key (or leave it auto)"
    with _one_line(f"index key {key!r} on {len(vectors):,} training vectors of {vectors.shape[1]}", mend):
        index = faiss.index_factory(vectors.shape[1], key, faiss.METRIC_INNER_PRODUCT)
        if (ivf := faiss.try_extract_index_ivf(index)) is not None:
            ivf.cp.seed = seed
            ivf.cp.min_points_per_centroid = 1  # or faiss writes a warning on stderr by itself
        index.train(vectors)
    return index


def cluster(vectors: Vectors, count: int, seed: int = 0) -> Vectors:
    """Centroids (count, d) of a small spherical k-means, to order the rows of an index without lists."""
    faiss = _faiss()
    kmeans = faiss.Kmeans(vectors.shape[1], count, niter=10, spherical=True, seed=seed, min_points_per_centroid=1)
    kmeans.train(vectors)
    centroids: Vectors = kmeans.centroids
    return centroids


def assign(index: Index, vectors: Vectors) -> Ids:
    """The inverted list (n,) of each vector (n, d), by the index's coarse quantizer after its transforms."""
    faiss = _faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        for i in range(index.chain.size()):
            vectors = index.chain.at(i).apply(vectors)
        return assign(index.index, vectors)
    if isinstance(index, faiss.IndexRefine):
        return assign(index.base_index, vectors)
    if isinstance(index, faiss.IndexIDMap):
        return assign(index.index, vectors)
    found: Ids = index.quantizer.search(vectors, 1)[1][:, 0]
    return found


def assign_nearest(centroids: Vectors, vectors: Vectors) -> Ids:
    """The centroid (n,) of largest inner product with each vector."""
    return nearest(vectors, centroids, 1)[1][:, 0]


def has_lists(index: Index) -> bool:
    """True for an index with inverted lists."""
    return _faiss().try_extract_index_ivf(index) is not None


def with_ids(index: Index) -> Index:
    """An index that takes explicit ids: itself where its kind stores ids, else wrapped in an id map."""
    return index if _stores_ids(index) else _faiss().IndexIDMap2(index)


def _stores_ids(index: Index) -> bool:
    faiss = _faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _stores_ids(index.index)
    return isinstance(index, (faiss.IndexIVF, faiss.IndexIDMap))


def add(index: Index, vectors: Vectors, ids: Ids) -> None:
    """Add vectors (n, d). An index that stores no ids numbers them itself, from its own ntotal."""
    if _stores_ids(index):
        index.add_with_ids(vectors, ids)
    else:
        index.add(vectors)


def efforts(index: Index) -> list[int]:
    """The efforts worth trying, ascending: nprobe, or efSearch; [] where there is nothing to tune."""
    faiss = _faiss()
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        most = min(ivf.nlist, MOST_PROBES)
        return [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
    wrappers = (faiss.IndexPreTransform, faiss.IndexRefine, faiss.IndexIDMap)
    while isinstance(index := faiss.downcast_index(index), wrappers):
        index = index.base_index if isinstance(index, faiss.IndexRefine) else index.index
    if isinstance(index, faiss.IndexHNSW):
        return [2**i for i in range(4, MOST_EF_SEARCH.bit_length())]
    return []


def _parameters(index: Index, effort: int) -> Any:
    """faiss's SearchParameters, wrapped as the index is; None where nothing can be set."""
    faiss = _faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters(index.index, effort)
        return inner and faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIDMap):
        return _parameters(index.index, effort)
    if isinstance(index, faiss.IndexRefine):
        inner = _parameters(index.base_index, effort)
        return faiss.IndexRefineSearchParameters(k_factor=REFINE_FACTOR, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=min(effort, index.nlist))
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=effort)
    return None


def search(index: Index, queries: Vectors, k: int, effort: int | None = None) -> tuple[Vectors, Ids]:
    """The k best of each query (n, d): scores (n, k) descending and ids (n, k), -1 where there are fewer."""
    scores, ids = index.search(queries, k, params=None if effort is None else _parameters(index, effort))
    return scores, ids


def nearest(queries: Vectors, vectors: Vectors, k: int) -> tuple[Vectors, Ids]:
    """Exact search of vectors (m, d): scores and row numbers (n, min(k, m)), descending."""
    faiss = _faiss()
    scores, ids = faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
    return scores, ids


def write(index: Index, path: str) -> None:
    """Save an index as a plain faiss file."""
    _faiss().write_index(index, path)


def read(path: str, mapped: bool = False) -> Index:
    """Load an index; `mapped` leaves its codes on disk, in the page cache. CorruptError if faiss cannot read it."""
    faiss = _faiss()
    try:
        return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-120:]
        raise CorruptError(f"{path} is not a readable faiss index ({reason}): delete it and merge again") from None


def use_threads(count: int) -> None:
    """Threads that faiss may use for what the calling thread asks of it."""
    _faiss().omp_set_num_threads(count)


def prepare_reconstruct(index: Index) -> None:
    """Make ids addressable in an index with lists (8 bytes or more a vector, once)."""
    faiss = _faiss()
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and ivf.direct_map.type == faiss.DirectMap.NoMap:
        ivf.set_direct_map_type(faiss.DirectMap.Hashtable)


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
