"""The metadata files of OUT: the schema of their rows, making a row, and reading rows back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clip_batch.errors import CorruptError
from clip_batch.storage.arrow import UNREADABLE, ParquetFile, caption_column
from clip_batch.storage.retry import corrupt_unless_unavailable
from clip_batch.storage.store import Store
from clip_batch.types import EXTRA_COLUMN, KEY_COLUMNS, Sample

LINEAGE = ("partition", "row")
"""The int32 columns that say where an index row came from: its partition, and its row in the partition's files."""


@contextmanager
def _open(store: Store, path: str) -> Iterator[ParquetFile]:
    what = f"{store.display(path)} is not readable"
    with corrupt_unless_unavailable(what, "run clip-batch verify", *UNREADABLE), store.open(path) as file:
        yield ParquetFile(file)


def count(store: Store, path: str) -> tuple[int, int]:
    """(rows, rows with a caption) of a part's Parquet file, from the footer if it has null counts of strings."""
    with _open(store, path) as file:
        rows: int = file.metadata.num_rows
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        if not (pa.types.is_string(file.schema.field("caption").type) and groups):
            return rows, rows - caption_column(file.read(["caption"])["caption"]).null_count
        paths = [groups[0].column(i).path_in_schema for i in range(groups[0].num_columns)]
        columns = [group.column(paths.index("caption")) for group in groups]
        if all(column.is_stats_set and column.statistics.has_null_count for column in columns):
            return rows, rows - sum(column.statistics.null_count for column in columns)
        return rows, rows - file.read(["caption"])["caption"].null_count


def without_caption(store: Store, path: str) -> npt.NDArray[np.bool_]:
    """Which rows (n,) of a part's Parquet file have no caption."""
    with _open(store, path) as file:
        missing: npt.NDArray[np.bool_] = caption_column(file.read(["caption"])["caption"]).is_null().to_numpy()
    return missing


def read_rows(store: Store, path: str, partition: int, start: int, stop: int) -> pa.Table:
    """Rows [start, stop) of a part's Parquet file, with the lineage columns; reads only their row groups."""
    with _open(store, path) as file:
        ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)])
        if stop > ends[-1]:
            raise CorruptError(f"{store.display(path)} has only {ends[-1]} rows: run clip-batch verify, then repair")
        first, last = int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop, "left"))
        table = file.read(groups=range(first, last + 1))
        before = int(ends[first - 1]) if first else 0
    return with_lineage(table.slice(start - before, stop - start), partition, start)


def read_groups(
    store: Store,
    path: str,
    partition: int,
    columns: Sequence[str],
    keep: Callable[[IO[bytes]], Sequence[int]] | None,
) -> Iterator[pa.Table]:
    """The rows of a part's Parquet file, row group by row group, with the lineage columns.

    Only `columns`, under the names that `with_lineage` gives them, are read. `keep` says which row groups.
    """
    groups: Sequence[int] | None = None
    if keep is not None:
        with store.open(path) as opened:
            groups = keep(opened)
    with _open(store, path) as file:
        starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))])
        names = [name for name in file.schema.names if (f"json_{name}" if name in LINEAGE else name) in columns]
        for group in range(file.metadata.num_row_groups) if groups is None else groups:
            table = file.read(names or file.schema.names[:1], [group])  # one column at least, for the number of rows
            yield with_lineage(table, partition, int(starts[group]))


def with_lineage(table: pa.Table, partition: int, start: int) -> pa.Table:
    """Rows of a part from row `start` on, with the lineage columns; a side-car field of such a name is renamed."""
    table = table.replace_schema_metadata(None)
    rows = np.arange(start, start + len(table), dtype=np.int32)
    for name, values in zip(LINEAGE, (np.full_like(rows, partition), rows), strict=True):
        if name in table.column_names:
            table = table.rename_columns([f"json_{name}" if old == name else old for old in table.column_names])
        table = table.append_column(pa.field(name, pa.int32()), pa.array(values))
    return table


def metadata_schema(fields: dict[str, str]) -> pa.Schema:
    """The one Arrow schema of every partition: key columns, pinned fields, the overflow column."""
    import pyarrow as pa

    kinds = {
        "string": pa.string(),
        "int64": pa.int64(),
        "double": pa.float64(),
        "bool": pa.bool_(),
        "json": pa.string(),
    }
    columns = dict.fromkeys(KEY_COLUMNS, pa.string())
    columns.update(offset=pa.int64(), length=pa.int64())
    columns.update({name: kinds[kind] for name, kind in fields.items()})
    return pa.schema([*columns.items(), (EXTRA_COLUMN, pa.string())])


def metadata_row(sample: Sample, caption: str | None, values: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """The metadata row of a sample. Side-car values that the pinned schema cannot hold go to `extra`, unchanged."""
    row: dict[str, Any] = {
        "key": sample.key,
        "shard": sample.shard,
        "offset": sample.offset,
        "length": sample.length,
        "caption": caption,
    }
    extra = {}
    for name, value in values.items():
        fits, cast = _cast(value, fields.get(name))
        if fits:
            row[name] = cast
        elif row.get(name) != value:
            extra[name] = value
    row[EXTRA_COLUMN] = _dump(extra) if extra else None
    return row


def _cast(value: Any, kind: str | None) -> tuple[bool, Any]:
    """(whether a JSON value fits the pinned kind without loss, the value to store)."""
    if kind is None:
        return False, None
    if value is None:
        return True, None
    if kind == "json":
        return True, _dump(value)
    if kind == "string":
        return isinstance(value, str), value
    if kind == "bool":
        return isinstance(value, bool), value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False, None
    if kind == "double":
        return isinstance(value, float) or abs(value) <= 2**53, value
    return isinstance(value, int) and -(2**63) <= value < 2**63, value


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
