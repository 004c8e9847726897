"""Search an index of the service, and read the metadata of what is found."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from clip_batch.search import find
from clip_batch.search.query import Criteria, QueryError
from clip_batch.search.rows import Ids, Vectors
from clip_batch.serve.http.errors import Refused
from clip_batch.serve.search.images import COLUMNS, has_image
from clip_batch.serve.search.schema import finite

if TYPE_CHECKING:
    from clip_batch.serve.search.live import OpenVersion
    from clip_batch.serve.search.service import Service

_FIELDS = {"safe": "safety", "nonviolent": "violence", "unique": "deduplicate"}
"""Names in a request of fields of Criteria that are named otherwise."""

_STEPS = {"index": "knn_index_time", "metadata": "metadata_get_time", "safety": "safety_time", "dedup": "dedup_time"}
"""The histogram of each step of a search."""


def check(service: Service, version: OpenVersion, criteria: Criteria) -> None:
    """Raise Refused (400) if this server or this index cannot search so."""
    try:
        find.check_criteria(version.searcher, criteria, service.heads)
    except QueryError as error:
        field = _FIELDS.get(error.field, error.field)
        raise Refused(400, f"{field}: {error.reason}", field) from None


def ranked(service: Service, version: OpenVersion, vector: Vectors, criteria: Criteria, scan: int) -> find.Ranked:
    """Return the best rows for a vector (d,), by checked criteria, among `scan` candidates at most. Blocks."""
    bounds = find.Bounds(service.config.prefilter_rows, scan)

    def timed(step: str) -> AbstractContextManager[object]:
        return service.metrics.steps[_STEPS[step]].time()

    return find.find(version.searcher, vector, criteria, service.heads, bounds, version.prefilter, timed)


def metadata(
    service: Service, version: OpenVersion, ids: Ids, columns: Sequence[str]
) -> tuple[list[dict[str, Any]], list[bool]]:
    """Return columns of rows (n,) as JSON can hold them, and which rows have an image that can be read. Blocks."""
    located = [name for name in COLUMNS if name in version.columns]
    with service.metrics.steps["metadata_get_time"].time():
        rows = version.searcher.metadata(ids, list(dict.fromkeys([*columns, *located])))
    whole = len(located) == len(COLUMNS)
    readable = [whole and has_image(row) and version.planned(int(id)) for id, row in zip(ids, rows, strict=True)]
    return [finite({name: row[name] for name in columns}) for row in rows], readable
