"""What is in an index: the columns that filters can name, a sample of its rows, and examples of queries."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from clip_batch.search import lineage
from clip_batch.serve.search.images import image_path
from clip_batch.serve.search.metadata import metadata, shown_columns

if TYPE_CHECKING:
    import pyarrow as pa

    from clip_batch.search.rows import Ids
    from clip_batch.serve.search.live import OpenVersion
    from clip_batch.serve.search.service import Service

LOOKED_AT, RUNS = 50_000, 250
"""Rows that are looked at, at most, and in how many runs of neighbours, whose metadata lies on the same pages."""

FEW, SAMPLE, EXAMPLES, BINS = 16, 48, 6, 24
"""The most values of a column that are listed, rows of the sample, examples, and bars of a histogram."""

PLACES = {*lineage.COLUMNS, "partition", "row", "row_group"}
"""Columns that say where a row came from. They are no filters for people."""

_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]|$)")


class Facts:
    """The facts of each open index, found once, at the first request."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._found: WeakKeyDictionary[OpenVersion, asyncio.Task[dict[str, Any]]] = WeakKeyDictionary()

    async def of(self, index: str) -> dict[str, Any]:
        """Return the facts of an index, as `FactsResponse` has them. Raises Refused as `Indices.use`."""
        with self._service.indices.use(index) as (_, version):
            task = self._found.get(version)
            if task is None or (task.done() and (task.cancelled() or task.exception())):
                task = self._found[version] = asyncio.create_task(self._find(index))
            return await asyncio.shield(task)

    async def _find(self, index: str) -> dict[str, Any]:
        """Find the facts, for all who wait for them: the version stays open though the first of them leaves."""
        with self._service.indices.use(index) as (name, version):
            return await self._service.threads.run(facts, self._service, name, version)


def facts(service: Service, name: str, version: OpenVersion) -> dict[str, Any]:
    """Return the facts of a version of the index `name`, as `FactsResponse` has them. Blocks."""
    manifest, shown = version.manifest, shown_columns(service, version)
    ids = version.searcher.select(_spread(manifest.rows)).ids
    columns = [column for column in shown if column not in PLACES]
    table = version.searcher.table(ids, columns) if columns and len(ids) else None
    sampled = _sample(service, name, version, ids, shown)
    found = [fact for column in columns if table is not None and (fact := _column(column, table[column]))]
    return {
        "index": name,
        "version": manifest.version,
        "created": manifest.created,
        "rows": manifest.rows,
        "model": manifest.encoder.model.rpartition("/")[2],
        "looked_at": len(ids),
        "columns": found,
        "sample": sampled,
        "examples": _examples(table["caption"].slice(0, 5000).to_pylist() if table and "caption" in columns else []),
    }


def _spread(rows: int) -> Ids:
    """Return the ids of all rows, or of `RUNS` runs of rows, evenly spread."""
    if rows <= LOOKED_AT:
        return np.arange(rows)
    starts = np.linspace(0, rows - LOOKED_AT // RUNS, RUNS).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(LOOKED_AT // RUNS))


def _sample(
    service: Service, name: str, version: OpenVersion, ids: Ids, columns: Sequence[str]
) -> list[dict[str, Any]]:
    """Return rows that are evenly spread, as hits without scores; those with images where there are any.

    They are mixed, always alike, as rows that resemble one another lie side by side in an index.
    """
    chosen = ids[np.linspace(0, len(ids) - 1, min(len(ids), 2 * SAMPLE)).astype(np.int64)] if len(ids) else ids
    rows, readable = metadata(service, version, chosen, columns)
    sample = [
        {"id": id, "image": image_path(name, version, id) if has_image else None, "metadata": row}
        for id, row, has_image in zip(chosen.tolist(), rows, readable, strict=True)
    ]
    pictured = [row for row in sample if row["image"]] or sample
    step = max(1, len(pictured) // SAMPLE)
    spread = pictured[::step][:SAMPLE]
    return [spread[place] for place in np.random.default_rng(0).permutation(len(spread))]


def _column(name: str, column: pa.ChunkedArray) -> dict[str, Any] | None:
    """Return the facts of a column; None if it is empty or of a kind that filters do not know."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_floating(kind):
        column = pc.if_else(pc.is_finite(column), column, None)
    values = column.drop_null()
    empty: dict[str, Any] = {"min": None, "max": None, "histogram": [], "values": []}
    known: dict[str, Any] = {"name": name, "nulls": len(column) - len(values), **empty}
    if not len(values):
        return None
    if pa.types.is_boolean(kind):
        return known | {"kind": "boolean", "values": _counts(values)}
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return known | _number(values)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return None
    if all(_DATE.match(text) for text in values.slice(0, 1000).to_pylist()):
        ends = pc.min_max(values).as_py()
        return known | {"kind": "date", "min": ends["min"][:10], "max": ends["max"][:10]}
    distinct = pc.count_distinct(values).as_py()
    few = distinct <= FEW and distinct < len(values) and pc.max(pc.utf8_length(values)).as_py() <= 200
    return known | {"kind": "text", "values": _counts(values) if few else []}


def _number(values: pa.ChunkedArray) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.compute as pc

    ends = pc.min_max(values).as_py()
    whole = pa.types.is_integer(values.type)
    few = whole and pc.count_distinct(values).as_py() <= FEW // 2
    bins = min(BINS, ends["max"] - ends["min"] + 1) if whole else BINS
    counts, _ = np.histogram(values.to_numpy().astype(np.float64), bins, (float(ends["min"]), float(ends["max"])))
    return {"kind": "number", **ends, "histogram": counts.tolist(), "values": _counts(values) if few else []}


def _counts(values: pa.ChunkedArray) -> list[dict[str, Any]]:
    """Return the values with their numbers of rows, the most frequent first."""
    counts = [{"value": one["values"], "count": one["counts"]} for one in values.value_counts().to_pylist()]
    return sorted(counts, key=lambda one: (-one["count"], str(one["value"])))


def _examples(captions: Sequence[str | None]) -> list[str]:
    """Return captions that a person might search for: a few words each, and no two that begin alike."""
    chosen: dict[str, str] = {}
    short = [text.strip() for text in captions if text and 3 <= len(text.strip()) <= 48 and "\n" not in text.strip()]
    for text in short[:: max(1, len(short) // 200)]:
        chosen.setdefault(text.split()[0].casefold() if " " in text else text[:2].casefold(), text)
    several = list(chosen.values())
    return several[:: max(1, len(several) // EXAMPLES)][:EXAMPLES]
