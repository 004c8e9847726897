"""Search of a faiss index: the best rows, the rows over a threshold, exact search without an index.

Nothing here changes an index while it is searched: nprobe, efSearch and removed rows travel with the request as faiss
SearchParameters, so any number of threads may search one index.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from clip_batch.index.ann.libfaiss import Index, innermost, load
from clip_batch.index.ann.order import best

if TYPE_CHECKING:
    import numpy.typing as npt

    from clip_batch.index.ann.libfaiss import Ids, Vectors

REFINE_FACTOR = 10
"""An index key that re-ranks (`...,RFlat`) re-ranks this many times k candidates."""

FIRST_DEPTH = 4096
"""Hits of the first search for all rows over a threshold, in a kind of index that has no such search."""

DEEP = 10_000
"""Hits from which taking all rows that a search scores, and sorting them, costs less than faiss's own selection."""

_FEW = 4
"""Most rows for each hit that a deep search may score: all of them are held in memory."""


@dataclass(frozen=True)
class Removed:
    """Rows that a search must not return: local ids (n,), sorted. Keep it between searches: it makes a bitmap once."""

    ids: Ids

    @property
    def count(self) -> int:
        """How many rows these are."""
        return len(self.ids)

    @cached_property
    def selector(self) -> Any:
        """faiss's test of an id: true for a row that is not removed."""
        bits = np.zeros(int(self.ids[-1]) // 8 + 1 if len(self.ids) else 1, dtype=np.uint8)
        np.bitwise_or.at(bits, self.ids >> 3, (1 << (self.ids & 7)).astype(np.uint8))
        return load().IDSelectorNot(load().IDSelectorBitmap(bits))  # each keeps a reference to its argument

    def has(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which of these ids are removed."""
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        removed: npt.NDArray[np.bool_] = self.ids[places] == ids
        return removed


@dataclass(frozen=True, eq=False)
class AllBut:
    """Rows that a search must not return, as a bit (uint8, the lowest first) for each of `rows`: `kept` have a one."""

    bits: npt.NDArray[np.uint8]
    rows: int
    kept: int

    @property
    def count(self) -> int:
        """How many rows these are."""
        return self.rows - self.kept

    @cached_property
    def selector(self) -> Any:
        """faiss's test of an id: true for a row that may be returned."""
        return load().IDSelectorBitmap(self.bits if len(self.bits) else np.zeros(1, np.uint8))

    def has(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which of these ids must not be returned."""
        kept: npt.NDArray[np.bool_] = (self.bits[ids >> 3] >> (ids & 7).astype(np.uint8)) & 1 == 0
        return kept


Excluded: TypeAlias = Removed | AllBut


def search(
    index: Index, queries: Vectors, k: int, effort: int | None = None, removed: Ids | Excluded | None = None
) -> tuple[Vectors, Ids]:
    """The k best rows of each query (n, d): scores (n, k), descending, and ids (n, k), -1 where there are fewer.

    `effort` is nprobe or efSearch, by default the index's own. Rows of `removed` (sorted ids) are not returned; where
    many are removed, HNSW finds fewer of the best at the same effort.
    """
    removed = Removed(removed) if isinstance(removed, np.ndarray) else removed
    if removed is None or not removed.count:
        removed = None
    elif not _takes_selector(index):
        return _search_past(removed, index, queries, k, k + min(k, removed.count), effort)
    parameters = _parameters(index, effort, removed and removed.selector)
    if k >= DEEP and _scored_rows(index, effort) <= _FEW * k:
        hits = [best(*_range_search(index, query, -np.inf, parameters), k) for query in queries[:, None]]
        return np.concatenate([scores for scores, _ in hits]), np.concatenate([ids for _, ids in hits])
    scores, ids = index.search(queries, k, params=parameters)
    return scores, ids


def search_over(
    index: Index, query: Vectors, threshold: float, effort: int | None = None, removed: Excluded | None = None
) -> tuple[Vectors, Ids]:
    """The rows of a query (1, d) that score `threshold` or more: scores (n,) and ids (n,), by ascending id.

    In a kind of index that has no such search, by ever deeper searches.
    """
    if _scored_rows(index, effort) < float("inf"):
        selector = removed.selector if removed and removed.count else None
        scores, ids = _range_search(index, query, threshold, _parameters(index, effort, selector))
    else:
        scores, ids = _search_deeper(index, query, threshold, effort, removed)
    order = np.argsort(ids[0])
    return scores[0, order], ids[0, order]


def nearest(queries: Vectors, vectors: Vectors, k: int) -> tuple[Vectors, Ids]:
    """Exact search of vectors (m, d): scores, descending, and row numbers, both (n, min(k, m))."""
    faiss = load()
    scores, ids = faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
    return scores, ids


def _parameters(index: Index, effort: int | None, selector: Any = None) -> Any:
    """faiss's SearchParameters, wrapped as the index is; None for a kind of index that takes none."""
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
    selected = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexIVF):
        nprobe = min(effort or index.nprobe, index.nlist)
        if (coarse := quantizer_parameters(index.quantizer, nprobe)) is not None:
            selected["quantizer_params"] = coarse
        return faiss.SearchParametersIVF(nprobe=nprobe, **selected)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=effort or index.hnsw.efSearch, **selected)
    return faiss.SearchParameters(**selected) if selected else None


def quantizer_parameters(quantizer: Index, nprobe: int) -> Any:
    """faiss's SearchParameters with which a coarse quantizer finds `nprobe` lists; None where it needs none.

    A graph visits only 16 candidates by default: of 256 lists it would find 154 right ones.
    """
    faiss = load()
    graph = faiss.downcast_index(quantizer)
    if not isinstance(graph, faiss.IndexHNSW) or graph.hnsw.efSearch >= nprobe:
        return None
    return faiss.SearchParametersHNSW(efSearch=nprobe)


def _takes_selector(index: Index) -> bool:
    """Whether this kind of index can skip removed rows while it searches."""
    faiss = load()
    kinds = faiss.IndexIVF, faiss.IndexHNSW, faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexRaBitQ
    return isinstance(innermost(index), kinds)


def _scored_rows(index: Index, effort: int | None) -> float:
    """About how many rows a search scores; infinity for a kind of index that cannot return all of them."""
    faiss = load()
    index = faiss.downcast_index(index)
    if isinstance(index, (faiss.IndexPreTransform, faiss.IndexIDMap)):
        return _scored_rows(index.index, effort)
    # The range search of RaBitQ leaves out rows that a search for the best finds, or scores them otherwise.
    kinds = faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ, faiss.IndexIVFPQFastScan
    if not isinstance(index, kinds):
        return float("inf")
    return float(index.ntotal * min(effort or index.nprobe, index.nlist) / index.nlist)


def _range_search(index: Index, query: Vectors, threshold: float, parameters: Any) -> tuple[Vectors, Ids]:
    """The rows that a search for one query (1, d) scores with `threshold` or more: (1, n), in no order."""
    least = np.finfo(np.float32).min
    below = max(np.nextafter(np.float32(threshold), np.float32(-np.inf)), least)  # faiss returns what is above
    _, scores, ids = index.range_search(query, float(below), params=parameters)
    return scores[None], ids[None]


def _search_past(
    removed: Excluded, index: Index, queries: Vectors, k: int, depth: int, effort: int | None
) -> tuple[Vectors, Ids]:
    """Search so deep that k hits remain without the removed rows, or that there are no more hits."""
    scores, ids = search(index, queries, depth, effort)
    alive = (ids >= 0) & ~removed.has(ids)
    first = np.argsort(~alive, axis=1, kind="stable")[:, :k]
    alive = np.take_along_axis(alive, first, 1)
    scores = np.where(alive, np.take_along_axis(scores, first, 1), np.float32(-np.inf))
    ids = np.where(alive, np.take_along_axis(ids, first, 1), -1)
    most = min(k + removed.count, index.ntotal)
    short = np.flatnonzero(~alive.all(axis=1))
    if len(short) and depth < most:
        scores[short], ids[short] = _search_past(removed, index, queries[short], k, min(4 * depth, most), effort)
    return scores, ids


def _search_deeper(
    index: Index, query: Vectors, threshold: float, effort: int | None, removed: Excluded | None
) -> tuple[Vectors, Ids]:
    depth = min(FIRST_DEPTH, index.ntotal)
    while True:
        scores, ids = search(index, query, max(depth, 1), effort, removed)
        hits = int(np.count_nonzero((ids[0] >= 0) & (scores[0] >= threshold)))
        if hits < depth or depth >= index.ntotal:
            return scores[:, :hits], ids[:, :hits]
        depth = min(8 * depth, index.ntotal)
