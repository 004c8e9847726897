"""The report on the rows that `merge --dedup` leaves out: which row each of them repeats, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_batch.embeddings.outputs import Outputs
from clip_batch.embeddings.reader import BLOCK, Embeddings, Rows
from clip_batch.index.merge.duplicates import Duplicates, Flags

REPORT_ROWS = 1 << 18
"""Duplicates whose metadata is in memory at a time."""

NAMES = {
    "partition": pa.int32(),
    "row": pa.int32(),
    "key": pa.string(),
    "shard": pa.string(),
    "offset": pa.int64(),
    "output": pa.string(),
}
"""The columns that name a row; `output` is its OUT."""

SCHEMA = pa.schema(
    [
        *NAMES.items(),
        *((f"kept_{name}", kind) for name, kind in NAMES.items()),
        ("score", pa.float32()),
        ("kept_id", pa.int64()),
        ("group", pa.int64()),
        ("reason", pa.string()),
    ]
)


def write(
    duplicates: Duplicates,
    source: Embeddings | Outputs,
    threshold: float,
    path: str,
    describe_live: Callable[[Rows], pa.Table] | None = None,
    removed: Rows | None = None,
) -> None:
    """Write a Parquet file with one row for each duplicate, in the order of OUT.

    Columns: those of `NAMES` of the row that is left out, and of the row that it repeats, with the prefix kept_; their
    cosine `score`; `kept_id`, the id of the repeated row in the version that is added to, null where it is a new one;
    `group`, one number for all rows that repeat the same row; and `reason`, a few words.
    `describe_live` gives the columns `NAMES` of ids (n,), ascending, of that version, and `removed` are the sorted ids
    of its removed rows.
    """
    gone = duplicates.live & np.isin(duplicates.kept, np.empty(0, np.int64) if removed is None else removed)
    groups = _groups(duplicates)
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for start in range(0, len(duplicates.rows), REPORT_ROWS):
            part = slice(start, start + REPORT_ROWS)
            rows, kept = duplicates.rows[part], duplicates.kept[part]
            live, score = duplicates.live[part], duplicates.score[part]
            both = np.unique(np.concatenate([rows, kept[~live]]))
            ids = np.unique(kept[live])
            tables = [describe(source, both)]
            if len(ids):
                assert describe_live is not None
                tables.append(describe_live(ids))
            known = pa.concat_tables(tables).combine_chunks()
            place = np.where(live, len(both) + np.searchsorted(ids, kept), np.searchsorted(both, kept))
            own, kept_rows = known.take(pa.array(np.searchsorted(both, rows))), known.take(pa.array(place))
            columns: list[Any] = [table[name] for table in (own, kept_rows) for name in NAMES]
            columns += [pa.array(score), pa.array(kept, mask=~live), pa.array(groups[part])]
            columns.append(pa.array(_reasons(rows, kept, live, gone[part], score, threshold), pa.string()))
            writer.write_table(pa.table(columns, schema=SCHEMA))


def _groups(duplicates: Duplicates) -> Rows:
    """A number (m,) for each duplicate, the same for those that repeat one row, in the order of their first."""
    names = np.stack([duplicates.live.astype(np.int64), duplicates.kept], axis=1)
    _, first, numbers = np.unique(names, axis=0, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[numbers.reshape(-1)]


def _reasons(rows: Rows, kept: Rows, live: Flags, gone: Flags, score: Any, threshold: float) -> list[str]:
    """Why each row (m,) is left out."""
    which = np.where(live, np.where(gone, "a removed row of the index", "a row of the index"), "an earlier row")
    which[~live & (kept > rows)] = "a later row"
    return [
        f"equal to {what}" if one == 1 else f"cosine {one:.4f} >= {threshold:g}, {what}"
        for what, one in zip(which.tolist(), score.tolist(), strict=True)
    ]


def describe(source: Embeddings | Outputs, rows: Rows) -> pa.Table:
    """The columns `NAMES` of rows (n,), ascending."""
    outputs = source.sources if isinstance(source, Outputs) else (source,)
    starts = source.starts if isinstance(source, Outputs) else [0, source.rows]
    pieces = [pa.schema(NAMES.items()).empty_table()]
    for output, first in zip(outputs, starts, strict=False):
        for start in range(0, output.rows, 4 * BLOCK):
            stop = min(start + 4 * BLOCK, output.rows)
            low, high = np.searchsorted(rows, [first + start, first + stop])
            if low == high:
                continue
            own = rows[low:high] - first
            tables = [named(table, output.store.url) for table in output.read_metadata(int(own[0]), int(own[-1]) + 1)]
            pieces.append(pa.concat_tables(tables).take(pa.array(own - own[0])))
    return pa.concat_tables(pieces).combine_chunks()


def named(table: pa.Table, output: str | None) -> pa.Table:
    """The columns `NAMES` of metadata of an OUT; a folder without commits lacks some of them: null."""
    columns = {
        name: table[name].cast(kind) if name in table.schema.names else pa.nulls(len(table), kind)
        for name, kind in NAMES.items()
        if name != "output"
    }
    return pa.table({**columns, "output": pa.array([output] * len(table), pa.string())}, pa.schema(NAMES.items()))
