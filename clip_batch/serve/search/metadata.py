"""The metadata of hits, as JSON can hold it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clip_batch.search.rows import Ids
from clip_batch.serve.http.hidden import without_paths

if TYPE_CHECKING:
    from clip_batch.serve.search.live import OpenVersion
    from clip_batch.serve.search.service import Service

SHARD = "shard"
"""The column with the path or URL of a row's tar, Parquet file or folder on the server."""


def shown_columns(service: Service, version: OpenVersion) -> list[str]:
    """Return the metadata columns of a version that the server's options allow in responses."""
    chosen = service.config.columns
    return [name for name in version.columns if not chosen or name in chosen]


def metadata(
    service: Service, version: OpenVersion, ids: Ids, columns: Sequence[str]
) -> tuple[list[dict[str, Any]], list[bool]]:
    """Return columns of rows (n,), and whether each row has an image that can be read. Blocks."""
    located = service.images.columns(version)
    with service.metrics.steps["metadata_get_time"].time():
        rows = version.searcher.metadata(ids, list(dict.fromkeys([*columns, *located])))
    readable = [service.images.has_image(version, int(id), row) for id, row in zip(ids, rows, strict=True)]
    values = [_to_json({name: row[name] for name in columns}) for row in rows]
    if SHARD in columns and not service.config.show_paths:
        for row in values:
            row[SHARD] = row[SHARD] and without_paths(row[SHARD], [row[SHARD]])
    return values, readable


def _to_json(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values as JSON can hold them: NaN and infinity become null, bytes and other types become text."""
    return {name: _json_value(value) for name, value in values.items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, dict):
        return _to_json({str(name): item for name, item in value.items()})
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
