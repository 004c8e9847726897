"""Hits as a Parquet file, for clients that send `Accept: application/vnd.apache.parquet`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import Response

if TYPE_CHECKING:
    from fastapi import Request

PARQUET = "application/vnd.apache.parquet"
"""Parquet's media type, as registered with IANA."""


def wants_parquet(request: Request) -> bool:
    """Whether the request's Accept header names Parquet."""
    kinds = (kind.partition(";")[0].strip().lower() for kind in request.headers.get("accept", "").split(","))
    return PARQUET in kinds


def parquet(hits: Sequence[Mapping[str, Any]]) -> Response:
    """Return a Parquet file with a row for each hit, best first: id int64, score float32, then the metadata columns.

    Metadata named `id` or `score` is in the columns `metadata.id` and `metadata.score`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for hit in hits for name in hit["metadata"])
    columns = {
        f"metadata.{name}" if name in ("id", "score") else name: _column([hit["metadata"].get(name) for hit in hits])
        for name in names
    }
    ids = pa.array([hit["id"] for hit in hits], pa.int64())
    scores = pa.array([hit["score"] for hit in hits], pa.float32())
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": ids, "score": scores, **columns}), sink)
    return Response(
        sink.getvalue(), media_type=PARQUET, headers={"content-disposition": 'attachment; filename="hits.parquet"'}
    )


def _column(values: list[Any]) -> Any:
    """Return the values as an Arrow array, or as JSON texts if they have no common type."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else json.dumps(value, ensure_ascii=False) for value in values])
