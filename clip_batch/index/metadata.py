"""Metadata in Arrow: the parts' Parquet in, one memory-mapped Arrow IPC file an index shard out.

Row i of a shard's file is the shard's vector i. A take goes record batch by record batch, some at once,
and restores the order asked: many times faster than a take over a table of chunked strings. Columns
of few distinct values lie dictionary-encoded in the file; readers get plain strings.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clip_batch.errors import CorruptError

BATCH_ROWS = 262_144
"""Rows of a record batch at the most: tests/bench/metadata.py says why."""

BATCH_BYTES = 2**27
"""Bytes of a record batch, about, at the most: some of them are what `write_ordered` holds."""

DICTIONARY_VALUES = 65_536
"""Distinct values of a dictionary-encoded column at the most; see `_dictionaries`."""

DICTIONARY_BYTES = 2**24
"""Of a dictionary at the most: it should stay in the processor's cache."""

READERS = 16
"""Threads of a process that take: as many pages of a cold file are waited for at once."""

SCAN = 100_000
"""Rows of a take from which the system reads ahead; below, what it would read around each page is waste."""

RUN = 1024
"""Rows between changes of the record batch, on average, from which each run is taken as it comes."""

LONGEST = 2**31 - 1
"""Bytes of one column in one piece: Arrow's 32-bit offsets end there, and its take does not say so."""

Rows = npt.NDArray[np.int64]


def same_schema(tables: Iterable[pa.Table], where: str) -> Iterator[pa.Table]:
    """The tables as they are; CorruptError, naming `where`, at the first whose schema is not the first one's."""
    schema: pa.Schema | None = None
    for table in tables:
        schema = table.schema if schema is None else schema
        if not table.schema.equals(schema):
            found, wanted = (
                ", ".join(f"{field.name}: {field.type}" for field in one if field not in other)
                for one, other in ((table.schema, schema), (schema, table.schema))
            )
            reason = f"{found or 'less'}, not {wanted or 'less, or in another order'}"[:200]
            raise CorruptError(f"{where}: metadata schemas differ among partitions ({reason}): embed anew")
        yield table


def write_ordered(tables: Iterable[pa.Table], order: Rows, path: str) -> None:
    """Write rows `order` (n,) of the tables, put one after another, as an Arrow IPC file.

    The rows go through a temporary file beside `path`, as large as the result: in memory are one of
    the tables and some record batches. CorruptError: the tables' schemas differ. IndexError: a row
    is in none of them.
    """
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path) or ".", prefix=".clip-batch-rows-") as spool:
        _spool(same_schema(tables, path), spool)
        rows = MetadataFile(spool.name)
        known = _dictionaries(rows.batches)
        schema = pa.schema(
            [
                field.with_type(pa.dictionary(pa.int32(), field.type)) if field.name in known else field
                for field in rows.schema
            ]
        )
        size = min(BATCH_ROWS, max(1, BATCH_BYTES * rows.rows // max(1, os.path.getsize(spool.name))))
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for start in range(0, len(order), size):
                piece = rows.take(order[start : start + size]).combine_chunks()
                for name, values in known.items():
                    at = piece.schema.get_field_index(name)
                    places = pc.index_in(piece.column(at), value_set=values).combine_chunks()
                    piece = piece.set_column(at, schema.field(name), pa.DictionaryArray.from_arrays(places, values))
                writer.write_table(piece)


def _spool(tables: Iterable[pa.Table], sink: Any) -> None:
    """Write tables as an Arrow IPC file; small ones share a record batch."""
    writer: Any = None
    waiting: list[pa.Table] = []
    for table in itertools.chain(tables, [None]):
        full = sum(map(len, waiting)) >= BATCH_ROWS or sum(one.nbytes for one in waiting) >= BATCH_BYTES
        if waiting and (full or table is None):
            writer = writer or pa.ipc.new_file(sink, waiting[0].schema)
            writer.write_table(pa.concat_tables(waiting).combine_chunks(), max_chunksize=BATCH_ROWS)
            waiting.clear()
        waiting.append(table)
    if writer is None:
        raise ValueError("metadata of no table at all has no schema")
    writer.close()
    sink.flush()


def _dictionaries(batches: Sequence[pa.RecordBatch]) -> dict[str, pa.Array]:
    """Column name -> its distinct values, for the string columns of which a dictionary makes half the bytes or less.

    Their takes are faster too, as long as the dictionary stays in the cache; so many values are not
    searched for beyond that.
    """
    known = {}
    for at, field in enumerate(batches[0].schema if batches else ()):
        columns = [batch.column(at) for batch in batches]
        if pa.types.is_string(field.type) and (values := _distinct(columns)) is not None:
            plain, encoded = sum(column.nbytes for column in columns), 4 * sum(map(len, columns)) + values.nbytes
            if 2 * encoded <= plain:
                known[field.name] = values
    return known


def _distinct(columns: Iterable[pa.Array]) -> pa.Array | None:
    """The distinct values in all of these, without null; None if they are too many or too large."""
    found = pa.array([], pa.string())
    for column in columns:
        more = column.unique()
        found = pa.concat_arrays([found, more]).unique() if more.nbytes <= DICTIONARY_BYTES else more
        if len(found) > DICTIONARY_VALUES or found.nbytes > DICTIONARY_BYTES:
            return None
    return found.drop_null()


class MetadataFile:
    """One shard's metadata, memory-mapped: only the pages that a take touches are read.

    `schema` is of what `take` returns: plain strings where the file has a dictionary. `batches` are
    the file's record batches, with a dictionary's indices (int32) in place of such columns.
    """

    def __init__(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._mapped)))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, ValueError) as error:
            raise CorruptError(f"{path} is not a readable Arrow file ({error}): merge again") from None
        encoded = [field.name for field in reader.schema if pa.types.is_dictionary(field.type)]
        # In a file a dictionary only grows: the last record batch knows all of it.
        self._values = {name: batches[-1].column(name).dictionary for name in encoded if batches}
        self._widest = {name: pc.max(pc.binary_length(values)).as_py() or 0 for name, values in self._values.items()}
        self.batches: list[pa.RecordBatch] = [
            pa.RecordBatch.from_arrays(
                [column.indices if pa.types.is_dictionary(column.type) else column for column in batch.columns],
                names=reader.schema.names,
            )
            for batch in batches
        ]
        self.schema: pa.Schema = pa.schema(
            [field.with_type(field.type.value_type) if field.name in encoded else field for field in reader.schema]
        )
        self._starts = np.cumsum([0, *map(len, batches)])
        self._widest_in: list[dict[str, int]] = [{} for _ in batches]

    @property
    def rows(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: npt.ArrayLike, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows (n,), in the order asked, repeats allowed. IndexError if a row is not in the file."""
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.rows):
            raise IndexError(f"metadata rows are 0 to {self.rows - 1}")
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        if not len(wanted):
            return schema.empty_table()
        self._mapped.madvise(mmap.MADV_RANDOM if len(wanted) < SCAN else mmap.MADV_NORMAL)
        return self._take(wanted, schema)

    def scan(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The values of a schema's columns, a batch of rows at a time, in order; null where the file lacks a column.

        Values are cast to the schema's types. Where the file keeps a column as a dictionary, so does the batch
        (`pa.DictionaryArray`), so that whoever judges values looks at each one once.
        """
        self._mapped.madvise(mmap.MADV_NORMAL)
        for batch in self.batches:
            yield pa.RecordBatch.from_arrays([self._column(batch, field) for field in schema], names=schema.names)

    def _column(self, batch: pa.RecordBatch, field: pa.Field) -> pa.Array:
        if field.name not in batch.schema.names:
            return pa.nulls(len(batch), field.type)
        column = batch.column(field.name)
        if field.name in self._values:
            column = pa.DictionaryArray.from_arrays(column, self._values[field.name])
        return column if self.schema.field(field.name).type == field.type else column.cast(field.type)

    def _take(self, asked: Rows, schema: pa.Schema) -> pa.Table:
        widest = max((self._widest.get(name, 0) for name in schema.names), default=0)
        if len(asked) > 1 and len(asked) * widest > LONGEST:
            return self._halves(asked, schema)
        wanted, batch, back = asked, np.searchsorted(self._starts, asked, "right") - 1, None
        if np.count_nonzero(np.diff(batch)) * RUN > len(asked) and np.any(np.diff(batch) < 0):
            # By batch alone, which is a radix sort: to sort within a batch costs more than it saves.
            order = np.argsort(batch.astype(np.min_scalar_type(len(self.batches))), kind="stable")
            wanted, batch, back = asked[order], batch[order], np.empty_like(order)
            back[order] = np.arange(len(order))
        cuts = (np.flatnonzero(np.diff(batch)) + 1).tolist()

        def gather(low: int, high: int) -> list[pa.RecordBatch]:
            number = batch[low]
            rows = wanted[low:high] - self._starts[number]
            return _pick(self.batches[number].select(schema.names), rows, self._widest_in[number])

        pool = _readers(os.getpid())
        pieces = pool.map(gather, [0, *cuts], [*cuts, len(wanted)])
        table = pa.Table.from_batches([batch for piece in pieces for batch in piece])
        if back is not None and any(column.nbytes > LONGEST for column in table.columns):
            return self._halves(asked, schema)

        def finish(name: str) -> pa.ChunkedArray:
            column = table[name]
            if back is not None:
                column = pa.chunked_array([pa.concat_arrays(column.chunks).take(pa.array(back))])
            return self._values[name].take(column) if name in self._values else column

        return pa.Table.from_arrays(list(pool.map(finish, schema.names)), schema=schema)

    def _halves(self, asked: Rows, schema: pa.Schema) -> pa.Table:
        """For what 32-bit offsets cannot reach at once."""
        middle = len(asked) // 2
        return pa.concat_tables([self._take(asked[:middle], schema), self._take(asked[middle:], schema)])


def _pick(batch: pa.RecordBatch, rows: Rows, widest: dict[str, int]) -> list[pa.RecordBatch]:
    """The rows of a record batch, in several where repeats would make a column longer than `LONGEST`."""
    if len(rows) == 1 or all(_fits(batch, name, rows, widest) for name in batch.schema.names):
        return [batch.take(pa.array(rows))]
    middle = len(rows) // 2
    return [*_pick(batch, rows[:middle], widest), *_pick(batch, rows[middle:], widest)]


def _fits(batch: pa.RecordBatch, name: str, rows: Rows, widest: dict[str, int]) -> bool:
    """Whether these rows of a column are `LONGEST` bytes or less; `widest` remembers its longest string."""
    column = batch.column(name)
    if not pa.types.is_string(column.type) or len(rows) * column.nbytes <= LONGEST:
        return True
    offsets = np.frombuffer(column.buffers()[1], dtype=np.int32)[column.offset :]
    if name not in widest:
        widest[name] = int(np.max(np.diff(offsets[: len(column) + 1])))
    return len(rows) * widest[name] <= LONGEST or bool(
        np.sum((offsets[rows + 1] - offsets[rows]).astype(int)) <= LONGEST
    )


@functools.cache
def _readers(process: int) -> ThreadPoolExecutor:
    """A process's own: threads do not survive a fork."""
    return ThreadPoolExecutor(READERS, "metadata")


def open_table(path: str) -> MetadataFile:
    """Open a shard's Arrow file, memory-mapped. CorruptError if it cannot be read."""
    return MetadataFile(path)


def common_schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Every column of several files; one that has types that do not fit together is text."""
    types: dict[str, pa.DataType] = {}
    for field in (field for schema in schemas for field in schema):
        known = types.setdefault(field.name, field.type)
        if known != field.type:
            try:
                both = [pa.schema([(field.name, kind)]) for kind in (known, field.type)]
                types[field.name] = pa.unify_schemas(both, promote_options="permissive").field(0).type
            except pa.ArrowTypeError:
                types[field.name] = pa.string()
    return pa.schema(list(types.items()))


def take_as(file: MetadataFile, rows: Rows, schema: pa.Schema) -> pa.Table:
    """Rows (n,) of a file in another schema; columns that the file has not got are null."""
    there = file.take(rows, [name for name in schema.names if name in file.schema.names])
    columns = [
        there[field.name].cast(field.type)
        if field.name in there.column_names
        else pa.chunked_array([pa.nulls(len(rows), field.type)])
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
