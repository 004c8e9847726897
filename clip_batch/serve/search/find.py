"""Searching an index of the service, with its heads, bounds and metrics."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from clip_batch.search import find
from clip_batch.search.evaluate import Check, unchecked
from clip_batch.search.query import Criteria, QueryError
from clip_batch.search.rows import Vectors
from clip_batch.serve.http.errors import Refused

if TYPE_CHECKING:
    from clip_batch.serve.search.live import OpenVersion
    from clip_batch.serve.search.service import Service

_FIELDS = {"safe": "safety", "nonviolent": "violence", "unique": "deduplicate"}
"""The names in a request of the fields of Criteria that have another name there."""

_STEPS = {"index": "knn_index_time", "metadata": "metadata_get_time", "safety": "safety_time", "dedup": "dedup_time"}
"""The histogram of each step that `search.find.find` times."""


def check(service: Service, version: OpenVersion, criteria: Criteria) -> None:
    """Raise Refused (400) if this server or this index cannot search by these criteria."""
    try:
        find.check_criteria(version.searcher, criteria, service.heads)
    except QueryError as error:
        field = _FIELDS.get(error.field, error.field)
        raise Refused(400, f"{field}: {error.reason}", field) from None


def ranked(
    service: Service,
    version: OpenVersion,
    vector: Vectors,
    criteria: Criteria,
    scan: int,
    check: Check = unchecked,
) -> find.Ranked:
    """Return the best rows for a vector (d,), by checked criteria, among `scan` candidates at most. Blocks.

    `check` is called every now and then, and ends the work by the error that it raises.
    """
    bounds = find.Bounds(service.config.prefilter_rows, scan)

    def timed(step: str) -> AbstractContextManager[object]:
        return service.metrics.steps[_STEPS[step]].time()

    return find.find(version.searcher, vector, criteria, service.heads, bounds, version.prefilter, timed, check)
