"""Parquet and Arrow IPC read through Python's file objects, by the calling thread alone.

pyarrow reads ahead and decodes in threads of its own. One that still holds a buffer of Python's when the
interpreter ends aborts the process, after the right result: now and then, in short commands. `pq.read_table` and
`ipc.open_file` cannot be told otherwise. Paths and memory maps are not concerned, nor is writing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

_MAGIC = b"ARROW1\0\0"


class ParquetFile:
    """A file that is open: `metadata` and `schema` from its footer, and rows of it.

    Rows are read row group by row group, as they lie in the file: column by column, a remote one would be asked for
    the same blocks again. pa.ArrowInvalid: it is not Parquet, or damaged.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = pq.ParquetFile(file, pre_buffer=False)
        self.metadata: Any = self._file.metadata
        self.schema: pa.Schema = self._file.schema_arrow

    def read(self, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None) -> pa.Table:
        """Of those row groups, the columns that are there, in the order asked; None: all of them."""
        groups = range(self.metadata.num_row_groups) if groups is None else groups
        parts = [[group] for group in groups] or [[]]
        return pa.concat_tables(self._file.read_row_groups(part, _names(columns), use_threads=False) for part in parts)

    def pieces(self, rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """As `read`, in tables of `rows` rows at the most."""
        for group in range(self.metadata.num_row_groups):
            for batch in self._file.iter_batches(rows, [group], _names(columns), use_threads=False):
                yield pa.Table.from_batches([batch])


def _names(columns: Sequence[str] | None) -> list[str] | None:
    return None if columns is None else list(columns)


def ipc_schema(file: IO[bytes]) -> pa.Schema:
    """The schema that an Arrow IPC file begins with. pa.ArrowInvalid: it is none."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise pa.ArrowInvalid("not an Arrow file")
    return pa.ipc.open_stream(file).schema
