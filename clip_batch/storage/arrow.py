"""Parquet and Arrow IPC files, read from Python file objects by the calling thread alone; and columns as text.

`pq.read_table` and `ipc.open_file` read ahead in threads of pyarrow. If such a thread still holds a Python buffer
when the interpreter ends, the process aborts, after the right result: now and then, in short commands. Reading
from paths and memory maps is safe, and so is writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clip_batch.storage.text import as_caption, as_text

UNREADABLE = (pa.ArrowException, UnicodeDecodeError)
"""The errors, besides OSError, that reading a damaged file raises."""

_MAGIC = b"ARROW1\0\0"


class ParquetFile:
    """An open Parquet file: its rows, and `metadata` and `schema` from its footer.

    Row groups are read one by one, in file order; reading column by column would request the blocks of a remote
    file more than once. With a `buffer_size`, only so many bytes of a column are in memory, not a row group's.
    OSError or one of UNREADABLE: the file is not Parquet, or damaged.
    """

    def __init__(self, file: IO[bytes], buffer_size: int = 0) -> None:
        self._file = pq.ParquetFile(file, pre_buffer=False, buffer_size=buffer_size)
        self.metadata: Any = self._file.metadata
        self.schema: pa.Schema = self._file.schema_arrow

    def read(self, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None) -> pa.Table:
        """Read row groups as one table; None reads all.

        The table has `columns` in the given order, less those that the file lacks.
        """
        groups = range(self.metadata.num_row_groups) if groups is None else groups
        parts = [[group] for group in groups] or [[]]
        return pa.concat_tables(self._file.read_row_groups(part, _names(columns), use_threads=False) for part in parts)

    def pieces(self, rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Read all rows as tables of at most `rows` rows; `columns` as in `read`."""
        for group in range(self.metadata.num_row_groups):
            for batch in self.batches(group, rows, columns):
                yield pa.Table.from_batches([batch])

    def batches(self, group: int, rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Read a row group as batches of at most `rows` rows; `columns` as in `read`."""
        batches: Iterator[pa.RecordBatch] = self._file.iter_batches(rows, [group], _names(columns), use_threads=False)
        return batches


def _names(columns: Sequence[str] | None) -> list[str] | None:
    return None if columns is None else list(columns)


def ipc_schema(file: IO[bytes]) -> pa.Schema:
    """Read the schema from the start of an Arrow IPC file. pa.ArrowInvalid: it is no such file."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise pa.ArrowInvalid("not an Arrow file")
    return pa.ipc.open_stream(file).schema


def text_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column as strings, each row by itself: undecodable bytes become U+FFFD, NaN null, lists JSON."""
    return _strings(column, as_text)


def caption_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column as `text_column` does, but of a list its first text that is not blank, and null for objects."""
    return _strings(column, as_caption)


def _strings(column: pa.ChunkedArray, convert: Callable[[Any], str | None]) -> pa.ChunkedArray:
    """Return a column as strings; rows that Arrow cannot convert are given to `convert`."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    raw = column.cast(undecoded(column.type))  # readers do not check that what a file calls a string is UTF-8
    if pa.types.is_floating(raw.type):
        raw = pc.if_else(pc.is_nan(raw), None, raw)
    try:
        return raw.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.chunked_array([pa.array(map(convert, raw.to_pylist()), pa.string())])


def undecoded(kind: pa.DataType) -> pa.DataType:
    """Return a type with binary in place of strings."""
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(undecoded(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(undecoded(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, undecoded(field.type)) for field in kind])
    return kind
