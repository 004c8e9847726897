"""Metadata in Arrow: the parts' Parquet in, one memory-mapped Arrow IPC file an index shard out.

Row i of a shard's file is the shard's vector i. Reads sort the wanted rows, take within each record
batch, and restore the order: many times faster than a take over a table of chunked strings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clip_batch.errors import CorruptError
from clip_batch.store import Store, Unavailable

LINEAGE = ("partition", "row")
"""int32 columns that say where an index row came from: the partition, and the row in its files."""

BATCH_ROWS = 65_536

_OFFSETS_LIMIT = 2**30
"""Above so many bytes in a column, its strings are moved with 64-bit offsets (32-bit ones end at 2 GiB)."""


@contextmanager
def _open(store: Store, path: str) -> Iterator[Any]:
    try:
        with store.open(path) as file:
            yield pq.ParquetFile(file, pre_buffer=True)
    except (Unavailable, PermissionError):  # that is not the file's fault
        raise
    except (OSError, pa.ArrowInvalid) as error:
        raise CorruptError(f"{store.display(path)} is not readable ({error}): run clip-batch verify") from None


def count(store: Store, path: str) -> tuple[int, int]:
    """(rows, rows with a caption) of a part's Parquet file, from its footer where that tells."""
    with _open(store, path) as file:
        column = file.schema_arrow.names.index("caption")
        groups = [file.metadata.row_group(i).column(column) for i in range(file.metadata.num_row_groups)]
        if all(group.is_stats_set and group.statistics.has_null_count for group in groups):
            missing = sum(group.statistics.null_count for group in groups)
        else:
            missing = file.read(columns=["caption"])["caption"].null_count
        return file.metadata.num_rows, file.metadata.num_rows - missing


def read_rows(store: Store, path: str, partition: int, start: int, stop: int) -> pa.Table:
    """Rows [start, stop) of a part's Parquet file, with the lineage columns. Reads only the row groups it needs."""
    with _open(store, path) as file:
        ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)])
        if stop > ends[-1]:
            raise CorruptError(f"{store.display(path)} has only {ends[-1]} rows: run clip-batch verify, then repair")
        first, last = int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop, "left"))
        table = file.read_row_groups(list(range(first, last + 1)))
        before = int(ends[first - 1]) if first else 0
    table = table.slice(start - before, stop - start).replace_schema_metadata(None)
    rows = np.arange(start, stop, dtype=np.int32)
    for name, values in zip(LINEAGE, (np.full_like(rows, partition), rows), strict=True):
        if name in table.column_names:  # a side-car field of that name gives way
            table = table.rename_columns([f"json_{name}" if old == name else old for old in table.column_names])
        table = table.append_column(pa.field(name, pa.int32()), pa.array(values))
    return table


def concat(tables: Sequence[pa.Table], where: str) -> pa.Table:
    """One table of several of one schema; CorruptError if the schemas differ."""
    try:
        return pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())[:200]
        raise CorruptError(f"{where}: metadata schemas differ among partitions ({reason}): embed anew") from None


def write_ordered(table: pa.Table, order: npt.NDArray[np.int64], path: str) -> None:
    """Write table rows in `order` as an Arrow IPC file, in record batches of 65,536 rows."""
    schema = table.schema
    large = [
        field.with_type(pa.large_string())
        if pa.types.is_string(field.type) and table[field.name].nbytes > _OFFSETS_LIMIT
        else field
        for field in schema
    ]
    whole = table.cast(pa.schema(large)).combine_chunks()
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(order), BATCH_ROWS):
            piece = whole.take(pa.array(order[start : start + BATCH_ROWS])).cast(schema)
            writer.write_table(piece.combine_chunks(), max_chunksize=BATCH_ROWS)


class MetadataFile:
    """One shard's metadata, memory-mapped: only the pages that a take touches are read."""

    def __init__(self, path: str) -> None:
        try:
            reader = pa.ipc.open_file(pa.memory_map(path))
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pa.ArrowInvalid) as error:
            raise CorruptError(f"{path} is not a readable Arrow file ({error}): merge again") from None
        self.schema: pa.Schema = reader.schema
        self._starts = np.cumsum([0, *(len(batch) for batch in self._batches)])

    @property
    def rows(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: npt.ArrayLike, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows (n,), in the order asked, repeats allowed. IndexError if a row is not in the file."""
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.rows):
            raise IndexError(f"metadata rows are 0 to {self.rows - 1}")
        order = np.argsort(wanted, kind="stable")
        ascending = wanted[order]
        cuts = np.searchsorted(ascending, self._starts)
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        pieces = []
        for batch, first, low, high in zip(self._batches, self._starts, cuts, cuts[1:], strict=False):
            if low < high:
                picked = batch if columns is None else batch.select(list(columns))
                pieces.append(picked.take(pa.array(ascending[low:high] - first)))
        table = pa.Table.from_batches(pieces, schema=schema)
        if np.array_equal(order, np.arange(len(order))):
            return table
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return table.combine_chunks().take(pa.array(back))


def open_table(path: str) -> MetadataFile:
    """Open a shard's Arrow file, memory-mapped. CorruptError if it cannot be read."""
    return MetadataFile(path)
