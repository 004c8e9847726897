"""Reads the metadata of an index shard: a memory-mapped Arrow IPC file whose row i belongs to the shard's vector i.

A take goes record batch by record batch, some at once, and then restores the order asked for: many times faster than a
take over a table of chunked strings.
"""

from __future__ import annotations

import functools
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clip_batch.errors import CorruptError

READERS = 16
"""Threads of a process that take rows, so that as many pages of a file that is not cached are read at once."""

SCAN = 100_000
"""Rows of a take from which the system should read ahead; for fewer, the pages read ahead would be wasted."""

RUN = 1024
"""Average rows between changes of the record batch from which rows are taken in the order asked for, unsorted."""

LONGEST = 2**31 - 1
"""Most bytes of a string column in one chunk: Arrow's 32-bit offsets end there, and its take does not check them."""

FEW = 64
"""Most rows of several files that are copied one by one, which takes less than a take of each file."""

Rows = npt.NDArray[np.int64]


class MetadataFile:
    """The metadata of one shard, memory-mapped: only the pages that a take touches are read.

    `schema` is that of the tables that `take` returns: plain strings where the file has a dictionary, which it has for
    the columns `dictionaries`. `batches` are its record batches, with the dictionary's indices (int32) in such columns.
    """

    def __init__(self, path: str) -> None:
        """Open a file. CorruptError if it cannot be read."""
        try:
            with open(path, "rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._mapped)))
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, ValueError) as error:
            raise CorruptError(f"{path} is not a readable Arrow file ({error}): merge again") from None
        encoded = [field.name for field in reader.schema if pa.types.is_dictionary(field.type)]
        # In a file a dictionary only grows: the last record batch has all of it.
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
        self._first_rows: list[int] = self._starts[:-1].tolist()
        self.dictionaries = frozenset(encoded)
        self._widest_in: list[dict[str, int]] = [{} for _ in batches]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return int(self._starts[-1])

    def take(self, rows: npt.ArrayLike, columns: Sequence[str] | None = None) -> pa.Table:
        """A table of the rows (n,), in that order, repeats allowed; by default of all columns.

        IndexError if a row is not in the file.
        """
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.rows):
            raise IndexError(f"metadata rows are 0 to {self.rows - 1}")
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        if not len(rows):
            return schema.empty_table()
        self._mapped.madvise(mmap.MADV_RANDOM if len(rows) < SCAN else mmap.MADV_NORMAL)
        return self._take(rows, schema)

    def batch_of(self, row: int) -> int:
        """The number of the record batch that has a row."""
        return bisect_right(self._first_rows, row) - 1

    def one_row(self, batch: int, row: int, columns: Sequence[str]) -> pa.RecordBatch:
        """A row of a record batch as a slice, of which nothing is read yet."""
        self._mapped.madvise(mmap.MADV_RANDOM)
        return self.batches[batch].select(columns).slice(row - self._first_rows[batch], 1)

    def decoded(self, column: str, index: int | None) -> pa.Array:
        """The value, an array (1,), of an index into the dictionary of a column."""
        values = self._values[column]
        return pa.nulls(1, values.type) if index is None else values.slice(index, 1)

    def scan(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The values of a schema's columns, a batch of rows at a time, in order; null where the file lacks a column.

        Values are cast to the schema's types. Where the file has a dictionary, the batch has a `pa.DictionaryArray`, so
        that a condition needs to be computed only once for each distinct value.
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

    def _take(self, rows: Rows, schema: pa.Schema) -> pa.Table:
        widest = max((self._widest.get(name, 0) for name in schema.names), default=0)
        if len(rows) > 1 and len(rows) * widest > LONGEST:
            return self._take_halves(rows, schema)
        ordered, batch, back = rows, np.searchsorted(self._starts, rows, "right") - 1, None
        if np.count_nonzero(np.diff(batch)) * RUN > len(rows) and np.any(np.diff(batch) < 0):
            # By batch alone, which is a radix sort: to sort within a batch costs more than it saves.
            order = np.argsort(batch.astype(np.min_scalar_type(len(self.batches))), kind="stable")
            ordered, batch, back = rows[order], batch[order], np.empty_like(order)
            back[order] = np.arange(len(order))
        cuts = (np.flatnonzero(np.diff(batch)) + 1).tolist()

        def gather(low: int, high: int) -> list[pa.RecordBatch]:
            number = batch[low]
            places = ordered[low:high] - self._starts[number]
            return _pick(self.batches[number].select(schema.names), places, self._widest_in[number])

        # To wake threads takes longer than to take a few rows; where they lie in several places, reads are to overlap.
        several = _readers(os.getpid()).map
        pieces = (several if cuts else map)(gather, [0, *cuts], [*cuts, len(ordered)])
        table = pa.Table.from_batches([batch for piece in pieces for batch in piece])
        if back is not None and any(column.nbytes > LONGEST for column in table.columns):
            return self._take_halves(rows, schema)

        def finish(name: str) -> pa.ChunkedArray:
            column = table[name]
            if back is not None:
                column = pa.chunked_array([pa.concat_arrays(column.chunks).take(pa.array(back))])
            return self._values[name].take(column) if name in self._values else column

        columns = (several if len(rows) >= RUN else map)(finish, schema.names)
        return pa.Table.from_arrays(list(columns), schema=schema)

    def _take_halves(self, rows: Rows, schema: pa.Schema) -> pa.Table:
        """Take the rows in two tables, as one column of all of them would be longer than `LONGEST`."""
        middle = len(rows) // 2
        return pa.concat_tables([self._take(rows[:middle], schema), self._take(rows[middle:], schema)])


def _pick(batch: pa.RecordBatch, rows: Rows, widest: dict[str, int]) -> list[pa.RecordBatch]:
    """The rows of a record batch, as several batches where repeats would make a column longer than `LONGEST`."""
    if len(rows) == 1 or all(_fits(batch, name, rows, widest) for name in batch.schema.names):
        return [batch.take(pa.array(rows))]
    middle = len(rows) // 2
    return [*_pick(batch, rows[:middle], widest), *_pick(batch, rows[middle:], widest)]


def _fits(batch: pa.RecordBatch, name: str, rows: Rows, widest: dict[str, int]) -> bool:
    """Whether these rows of a column are `LONGEST` bytes or less.

    `widest` keeps the length of the longest string by column, which saves small takes the sum of their lengths.
    """
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
    """The threads of a process; `process` is in the key of the cache because threads do not survive a fork."""
    return ThreadPoolExecutor(READERS, "metadata")


def common_schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """A schema with every column of several files; a column whose types do not fit together is text."""
    types: dict[str, pa.DataType] = {}
    for field in (field for schema in schemas for field in schema):
        first = types.setdefault(field.name, field.type)
        if first != field.type:
            try:
                both = [pa.schema([(field.name, kind)]) for kind in (first, field.type)]
                types[field.name] = pa.unify_schemas(both, promote_options="permissive").field(0).type
            except pa.ArrowTypeError:
                types[field.name] = pa.string()
    return pa.schema(list(types.items()))


def take_as(file: MetadataFile, rows: Rows, schema: pa.Schema) -> pa.Table:
    """Rows (n,) of a file in another schema; columns that the file lacks are null."""
    table = file.take(rows, [name for name in schema.names if name in file.schema.names])
    if table.schema.equals(schema):
        return table
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.chunked_array([pa.nulls(len(rows), field.type)])
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def uniform(files: Sequence[MetadataFile]) -> bool:
    """Whether files have the same columns, types and dictionary columns, as `take_few` needs."""
    return all((file.schema, file.dictionaries) == (files[0].schema, files[0].dictionaries) for file in files)


def take_few(files: Sequence[MetadataFile], rows: Rows, columns: Sequence[str]) -> pa.Table | None:
    """Row rows[i] of files[i], for each i; a few rows of uniform files, copied at once by the calling thread.

    None where `take_as` is to do it: no columns, no rows or more than `FEW`, rows in several record batches of a file,
    which threads should read at once, or too many bytes for one array.
    """
    if not columns or not 0 < len(rows) <= FEW:
        return None
    places = [(file, file.batch_of(row), row) for file, row in zip(files, rows.tolist(), strict=True)]
    if len({(id(file), batch) for file, batch, _ in places}) > len({id(file) for file in files}):
        return None
    try:
        slices = [file.one_row(batch, row, columns) for file, batch, row in places]
        table = pa.Table.from_batches(slices).combine_chunks()
        for place, name in enumerate(columns):
            if name in files[0].dictionaries:
                indices = zip(files, table[name].to_pylist(), strict=True)
                values = pa.concat_arrays([file.decoded(name, index) for file, index in indices])
                table = table.set_column(place, files[0].schema.field(name), values)
    except pa.ArrowInvalid:  # offsets of more than 32 bits
        return None
    return pa.Table.from_arrays(table.columns, schema=pa.schema([files[0].schema.field(name) for name in columns]))
