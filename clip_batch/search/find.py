"""From a query's vector to the rows it finds: conditions, heads, near duplicates and beauty, over any Backend.

`find` gives the k best rows, and searches deeper until there are k; `find_over` gives every row over a threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from clip_batch.search import dedup
from clip_batch.search.backend import Backend, ExhaustiveBackend
from clip_batch.search.checks import check_columns, modality_in
from clip_batch.search.conditions import Condition, columns_in
from clip_batch.search.evaluate import Check, Evaluator, unchecked
from clip_batch.search.heads import LIMIT, Head, Heads
from clip_batch.search.prefilter import Prefilter
from clip_batch.search.query import Criteria, K, Query, QueryError, kind_of
from clip_batch.search.rows import Ids, Vectors
from clip_batch.search.vectors import query_vector, unit_vector

PREFILTER_ROWS = 20_000_000
"""The most rows of an index whose metadata is looked through as a whole for a condition, unless it is said otherwise.

`tests/bench/filters.py` measures how long that takes."""

_FIRST = 100
"""The least candidates that are looked at first, where some will be left out."""

Timed = Callable[[str], AbstractContextManager[object]]
"""A step's name to a context in which it is timed: metadata, index, safety, dedup."""


@dataclass(frozen=True)
class Bounds:
    """How much work a query may be.

    - `prefilter_rows`: in an index of up to so many rows a condition is looked up in all metadata before the search.
      In a larger one it is applied to the hits of an ever deeper search.
    - `scan`: candidates that may be looked through for k hits.
    - `compared`: hits that are judged by their vectors; the work of finding near duplicates grows with their square.
    """

    prefilter_rows: int = PREFILTER_ROWS
    scan: int = 100_000
    compared: int = dedup.MOST


THOROUGH = Bounds(prefilter_rows=2**63, scan=1_000_000, compared=100_000)
"""For what selects rows to keep, and may take its time: a filter, a training set."""


@dataclass(frozen=True)
class Ranked:
    """Ids (n,), scores (n,) and, where a weight was given, what the aesthetic head says (n,), best first.

    `scanned` candidates were looked through; `complete` is false where the bounds left fewer than k rows.
    """

    ids: Ids
    scores: Vectors
    aesthetic: Vectors | None
    scanned: int
    complete: bool


def _untimed(_: str) -> AbstractContextManager[object]:
    return nullcontext()


def best_rows(
    backend: Backend,
    query: Query,
    heads: Heads = Heads(),
    bounds: Bounds = Bounds(),
    prefilter: Prefilter | None = None,
) -> Ranked:
    """The k best rows of a query. Errors: as `check_criteria` and `query_vector`."""
    check_criteria(backend, query, heads, bounds)
    vector = beautified(query_vector(backend, query), query, heads)
    if query.kind is None:
        query = replace(query, kind=kind_of((bool(term.text), bool(term.image)) for term in query.all_terms()))
    return find(backend, vector, query, heads, bounds, prefilter)


def rows_over(
    backend: ExhaustiveBackend, query: Query, heads: Heads = Heads(), bounds: Bounds = THOROUGH
) -> Iterator[tuple[Vectors, Ids]]:
    """Scores (n,) and ids (n,) of every row over a query's threshold, as `find_over`. Errors: as `best_rows`."""
    check_criteria(backend, query, heads, bounds)
    return find_over(backend, query_vector(backend, query), query, heads, bounds)


def check_criteria(backend: Backend, criteria: Criteria, heads: Heads, bounds: Bounds = Bounds()) -> None:
    """QueryError, or ConfigError for a column, where an index and heads cannot meet criteria."""
    if modality_in(backend.manifest, criteria.modality) not in backend.manifest.key:
        there = ", ".join(backend.manifest.key)
        raise QueryError("modality", f"{criteria.modality} is not in this index; it has {there}")
    if criteria.condition is not None:
        check_columns(backend.schema, columns_in(criteria.condition))
    k = min(criteria.k or K, backend.manifest.rows)
    if k > backend.most:
        raise QueryError("k", f"{backend.most} at most in this index")
    if criteria.k is not None and criteria.judged and k > bounds.compared:
        raise QueryError("k", f"{bounds.compared} at most where near duplicates, or what heads refuse, are left out")
    for field, asked, head in (
        ("safe", criteria.safe, heads.safety),
        ("nonviolent", criteria.nonviolent, heads.violence),
        ("aesthetic", criteria.aesthetic is not None, heads.aesthetic),
    ):
        if asked and head is None and not (field == "aesthetic" and heads.ratings is not None):
            raise QueryError(field, "no head for it was given here; docs/serve.md tells of heads")
        if asked and head is not None and head.dim != backend.manifest.dim:
            raise QueryError(field, f"the head is for {head.dim} dimensions, not {backend.manifest.dim}")


def beautified(vector: Vectors, criteria: Criteria, heads: Heads) -> Vectors:
    """A query's unit vector (d,), moved towards the best rating where the aesthetic head is a vector a rating."""
    if criteria.aesthetic is None or heads.ratings is None:
        return vector
    return unit_vector(vector + criteria.aesthetic * heads.ratings[-1], "aesthetic")


def find(
    backend: Backend,
    vector: Vectors,
    criteria: Criteria,
    heads: Heads = Heads(),
    bounds: Bounds = Bounds(),
    prefilter: Prefilter | None = None,
    timed: Timed = _untimed,
    check: Check = unchecked,
) -> Ranked:
    """The k best rows for a query's unit vector (d,), by checked criteria. Blocks.

    A rare condition in an index of more than `bounds.prefilter_rows` may be met by rows that lie deeper than
    `bounds.scan`: then `complete` is false. `prefilter` keeps look-ups for later queries. `check` is called every now
    and then, and ends the work by the error that it raises.
    """
    modality = modality_in(backend.manifest, criteria.modality)
    k, condition, among = min(criteria.k or K, max(1, backend.manifest.rows)), criteria.condition, None
    if condition is not None and backend.manifest.rows <= bounds.prefilter_rows:
        with timed("metadata"):
            among, condition = (prefilter or Prefilter(backend)).select(condition, check), None
    deepest = min(max(k, min(bounds.scan, backend.manifest.rows)), backend.most)
    depth = k
    if condition is not None or criteria.judged:
        depth = min(deepest, max(4 * k, _FIRST))
    while True:
        check()
        with timed("index"):
            all_scores, all_ids = backend.search_ids(vector, depth, modality, criteria.effort, among, criteria.kind)
        hits = all_ids[0] >= 0
        if criteria.threshold is not None:
            hits &= all_scores[0] >= criteria.threshold
        ids, scores = all_ids[0][hits], all_scores[0][hits]
        exhausted = len(ids) < depth or depth >= backend.manifest.rows
        kept = np.arange(len(ids))
        if condition is not None:
            with timed("metadata"):
                kept = np.flatnonzero(_matches(backend, condition, ids, check))
        aesthetic = None
        if criteria.judged:
            kept = kept[: bounds.compared]
            kept, aesthetic = _judged(backend, ids, kept, criteria, heads, timed)
        if len(kept) >= k or exhausted or depth >= deepest:
            break
        depth = min(4 * depth, deepest)
    if aesthetic is not None:
        assert criteria.aesthetic is not None
        order = np.argsort(-(scores[kept] + criteria.aesthetic * aesthetic), kind="stable")
        kept, aesthetic = kept[order], aesthetic[order][:k]
    best = kept[:k]
    return Ranked(ids[best], scores[best], aesthetic, len(ids), exhausted or len(best) >= k)


def find_over(
    backend: ExhaustiveBackend, vector: Vectors, criteria: Criteria, heads: Heads = Heads(), bounds: Bounds = THOROUGH
) -> Iterator[tuple[Vectors, Ids]]:
    """Scores (n,) and ids (n,) of every row over the threshold of checked criteria, by ascending id, index by index.

    As far as `effort` lets the index find them. With `unique` all come at once. QueryError: `aesthetic` is given,
    which orders the best k, or `unique` has more rows to compare than `bounds.compared`.
    """
    assert criteria.threshold is not None
    if criteria.aesthetic is not None:
        raise QueryError("aesthetic", "it orders the k best rows: give k, or leave it out")
    pieces = _pieces_over(backend, vector, criteria, heads)
    if not criteria.unique:
        yield from pieces
        return
    nothing = np.empty(0, np.float32), np.empty(0, np.int64)
    scores, ids = (np.concatenate(parts) for parts in zip(nothing, *pieces, strict=True))
    if len(ids) > bounds.compared:
        many = f"{len(ids)} rows are over the threshold, and {bounds.compared} can be compared"
        raise QueryError("unique", f"{many}: raise the threshold, or give k")
    best = np.lexsort((ids, -scores))
    first = dedup.representatives(_unit_rows(backend, ids[best], criteria), criteria.unique_threshold)
    kept = np.sort(best[first])
    yield scores[kept], ids[kept]


def _pieces_over(
    backend: ExhaustiveBackend, vector: Vectors, criteria: Criteria, heads: Heads
) -> Iterator[tuple[Vectors, Ids]]:
    """`find_over` without near duplicates."""
    assert criteria.threshold is not None
    modality = modality_in(backend.manifest, criteria.modality)
    for scores, ids in backend.search_over(vector, criteria.threshold, modality, criteria.effort):
        kept = np.arange(len(ids))
        if criteria.condition is not None:
            kept = np.flatnonzero(_matches(backend, criteria.condition, ids))
        if criteria.safe or criteria.nonviolent:
            vectors = _unit_rows(backend, ids[kept], criteria)
            kept = kept[_passed(vectors, criteria, heads, _untimed)]
        yield scores[kept], ids[kept]


def _matches(backend: Backend, condition: Condition, ids: Ids, check: Check = unchecked) -> npt.NDArray[np.bool_]:
    return Evaluator(condition, check).matches(backend.table(ids, columns_in(condition)))


def _judged(
    backend: Backend, ids: Ids, kept: Ids, criteria: Criteria, heads: Heads, timed: Timed
) -> tuple[Ids, Vectors | None]:
    """The places that pass heads and deduplication, and what the aesthetic head says of them."""
    vectors = _unit_rows(backend, ids[kept], criteria)
    passed = _passed(vectors, criteria, heads, timed)
    kept, vectors = kept[passed], vectors[passed]
    if criteria.unique:
        with timed("dedup"):
            first = dedup.representatives(vectors, criteria.unique_threshold)
        kept, vectors = kept[first], vectors[first]
    head: Head | None = heads.aesthetic
    return kept, head(vectors) if head is not None and criteria.aesthetic is not None else None


def _passed(vectors: Vectors, criteria: Criteria, heads: Heads, timed: Timed) -> npt.NDArray[np.bool_]:
    """True (n,) for the vectors that the heads let pass."""
    passed = np.ones(len(vectors), dtype=bool)
    if criteria.safe and heads.safety is not None:
        with timed("safety"):
            passed &= heads.safety(vectors) <= LIMIT
    if criteria.nonviolent and heads.violence is not None:
        passed &= heads.violence(vectors) <= LIMIT
    return passed


def _unit_rows(backend: Backend, ids: Ids, criteria: Criteria) -> Vectors:
    """The unit vectors (n, d) of rows; zero for a row without one."""
    vectors = backend.reconstruct(ids, modality_in(backend.manifest, criteria.modality))
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors
