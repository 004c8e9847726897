"""From a query's vector to hits: search, filters, heads, near duplicates, beauty; deeper until there are k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clip_batch.search import dedup
from clip_batch.search.filters import Filter
from clip_batch.search.heads import LIMIT, Head
from clip_batch.serve.http.errors import Refused
from clip_batch.serve.search.images import COLUMNS, has_image
from clip_batch.serve.search.schema import finite

if TYPE_CHECKING:
    from clip_batch.serve.search.live import OpenVersion
    from clip_batch.serve.search.service import Service

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_FIRST = 100
"""Candidates that are looked at first, at the least, where some will be left out."""


@dataclass(frozen=True)
class Wanted:
    """How to search and what to leave out; `scan` is how many candidates may be looked through for k hits."""

    k: int
    scan: int
    modality: str = "image"
    effort: int | None = None
    threshold: float | None = None
    filters: Sequence[Filter] = ()
    duplicates: float | None = None
    safety: bool = False
    violence: bool = False
    aesthetic: float | None = None

    @property
    def on_vectors(self) -> bool:
        """Whether the hits' own vectors are needed."""
        return self.duplicates is not None or self.safety or self.violence or self.aesthetic is not None


@dataclass(frozen=True)
class SearchResult:
    """Ids (n,), scores (n,) and, if asked, what the aesthetic head says (n,), in the order of the answer.

    `scanned` candidates were looked through; `complete` is false where that bound left fewer than k.
    """

    ids: Ids
    scores: Vectors
    aesthetic: Vectors | None
    scanned: int
    complete: bool


def check(service: Service, version: OpenVersion, wanted: Wanted) -> None:
    """Refused (400) where this server or this index cannot do what is wanted."""
    if wanted.modality not in version.modalities:
        there = ", ".join(version.modalities)
        raise Refused(400, f"modality: {wanted.modality} is not in this index; there is {there}", "modality")
    for number, condition in enumerate(wanted.filters):
        if condition.column not in version.columns:
            field = f"filters.{number}.column"
            raise Refused(400, f"{field}: no column {condition.column!r}; {', '.join(version.columns)}", field)
    if wanted.k > version.searcher.most:
        raise Refused(400, f"k: {version.searcher.most} at most in this index", "k")
    if wanted.on_vectors and wanted.k > dedup.MOST:
        raise Refused(400, f"k: {dedup.MOST} at most with deduplicate, safety, violence or aesthetic", "k")
    heads = {"safety": (wanted.safety, service.heads.safety), "violence": (wanted.violence, service.heads.violence)}
    heads["aesthetic"] = (wanted.aesthetic is not None, service.heads.aesthetic)
    for field, (asked, head) in heads.items():
        if asked and head is None and not (field == "aesthetic" and service.heads.ratings is not None):
            raise Refused(400, f"{field}: this server has no {field} head", field)
        if asked and head is not None and head.dim != version.manifest.dim:
            raise Refused(400, f"{field}: the head is for {head.dim} dimensions, not {version.manifest.dim}", field)


def find(service: Service, version: OpenVersion, vector: Vectors, wanted: Wanted) -> SearchResult:
    """The k best of what is wanted, for a checked request. Blocks: call it in a thread.

    In an index of up to `prefilter_rows` the search finds only what meets the filters. In a larger one filters
    are applied to the hits of an ever deeper search, so a rare condition may be met by rows that lie
    deeper than `scan`: then `complete` is false.
    """
    among, filters = None, wanted.filters
    if filters and version.manifest.rows <= service.config.prefilter_rows:
        with service.metrics.steps["metadata_get_time"].time():
            among, filters = version.prefilter.select(filters), ()
    most = min(max(wanted.k, min(wanted.scan, version.manifest.rows)), version.searcher.most)
    depth = wanted.k
    if filters or wanted.on_vectors:
        depth = min(most, max(4 * wanted.k, _FIRST))
    while True:
        with service.metrics.steps["knn_index_time"].time():
            scores, ids = version.searcher.search_ids(vector, depth, wanted.modality, wanted.effort, among)
        there = ids[0] >= 0
        if wanted.threshold is not None:
            there &= scores[0] >= wanted.threshold
        ids, scores = ids[0][there], scores[0][there]
        exhausted = len(ids) < depth
        kept = _filtered(service, version, ids, filters)
        if wanted.on_vectors:
            kept = kept[: dedup.MOST]
            kept, aesthetic = _judged(service, version, ids, kept, wanted)
        else:
            aesthetic = None
        if len(kept) >= wanted.k or exhausted or depth >= most:
            break
        depth = min(4 * depth, most)
    order = np.arange(len(kept))
    if aesthetic is not None:
        assert wanted.aesthetic is not None
        order = np.argsort(-(scores[kept] + wanted.aesthetic * aesthetic), kind="stable")
        aesthetic = aesthetic[order][: wanted.k]
    best = kept[order][: wanted.k]
    return SearchResult(ids[best], scores[best], aesthetic, len(ids), exhausted or len(best) >= wanted.k)


def _filtered(service: Service, version: OpenVersion, ids: Ids, filters: Sequence[Filter]) -> Ids:
    """The places of ids whose metadata meets all filters."""
    if not filters:
        return np.arange(len(ids))
    columns = list(dict.fromkeys(condition.column for condition in filters))
    with service.metrics.steps["metadata_get_time"].time():
        rows = version.searcher.metadata(ids, columns)
    meets = [all(condition.holds(row[condition.column]) for condition in filters) for row in rows]
    return np.flatnonzero(meets)


def _judged(service: Service, version: OpenVersion, ids: Ids, kept: Ids, wanted: Wanted) -> tuple[Ids, Vectors | None]:
    """The places that pass heads and deduplication, and what the aesthetic head says of them."""
    vectors = version.searcher.reconstruct(ids[kept], wanted.modality)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    passed = np.ones(len(kept), dtype=bool)
    if wanted.safety and service.heads.safety is not None:
        with service.metrics.steps["safety_time"].time():
            passed &= service.heads.safety(vectors) <= LIMIT
    if wanted.violence and service.heads.violence is not None:
        passed &= service.heads.violence(vectors) <= LIMIT
    kept, vectors = kept[passed], vectors[passed]
    if wanted.duplicates is not None:
        with service.metrics.steps["dedup_time"].time():
            first = dedup.representatives(vectors, wanted.duplicates)
        kept, vectors = kept[first], vectors[first]
    head: Head | None = service.heads.aesthetic
    return kept, head(vectors) if head is not None and wanted.aesthetic is not None else None


def metadata(
    service: Service, version: OpenVersion, ids: Ids, columns: Sequence[str]
) -> tuple[list[dict[str, Any]], list[bool]]:
    """These columns of rows (n,), as JSON can hold them, and which rows have an image that can be read. Blocks."""
    located = [name for name in COLUMNS if name in version.columns]
    with service.metrics.steps["metadata_get_time"].time():
        rows = version.searcher.metadata(ids, list(dict.fromkeys([*columns, *located])))
    whole = len(located) == len(COLUMNS)
    readable = [whole and has_image(row) and version.planned(int(id)) for id, row in zip(ids, rows, strict=True)]
    return [finite({name: row[name] for name in columns}) for row in rows], readable
