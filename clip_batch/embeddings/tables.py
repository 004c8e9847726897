"""Reads metadata Parquet of any schema, such as pandas writes, as tables of one schema: our columns, then the others.

pandas infers types file by file: a column of integers in one file may be floats in the next, where a value is missing,
and null in a third. So the schema is the union of all files' schemas, and each table is cast to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from clip_batch.embeddings import metadata
from clip_batch.storage.arrow import UNREADABLE, ParquetFile, caption_column, text_column
from clip_batch.storage.retry import corrupt_unless_unavailable
from clip_batch.storage.store import Store
from clip_batch.types import KEY_COLUMNS

VERSION = 2
"""Version of the tables that a file becomes; raise it when they change, because they are kept in caches."""

TEXT = pa.string()
OURS = {"key": TEXT, "shard": TEXT, "offset": pa.int64(), "length": pa.int64(), "caption": TEXT}
RESERVED = ("shard", "offset", "length")
"""Columns that say where an image lies in its tar; in files that clip-batch did not write, they mean something else."""

_PANDAS_INDEX = re.compile(r"__index_level_\d+__")


class Footer(NamedTuple):
    """The number of rows in each row group of a Parquet file, and its schema."""

    groups: tuple[int, ...]
    schema: pa.Schema


class Tables:
    """The Parquet files of a folder, given as (number, path) in the order of their rows.

    `footers` has the footer of each path. `schema`, which every table has, is `OURS`, the other columns of all files,
    and the lineage columns. CorruptError: a file is not readable as Parquet.
    """

    def __init__(self, store: Store, files: Sequence[tuple[int, str]]) -> None:
        self.store = store
        self.files = tuple(files)
        with ThreadPoolExecutor(16) as pool:
            self.footers: dict[str, Footer] = dict(pool.map(self._footer, (path for _, path in files)))
        schemas = [footer.schema for footer in self.footers.values()]
        # Whether clip-batch wrote the files, so that shard, offset and length mean what they do here.
        self._own = bool(schemas) and all(set(KEY_COLUMNS) <= set(schema.names) for schema in schemas)
        self.schema = self._union(schemas)

    def _footer(self, path: str) -> tuple[str, Footer]:
        what = f"{self.store.display(path)} is not readable Parquet"
        with corrupt_unless_unavailable(what, "copy it again", *UNREADABLE), self.store.open(path) as file:
            parquet = ParquetFile(file)
            groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
            return path, Footer(tuple(groups), parquet.schema)

    def _union(self, schemas: Sequence[pa.Schema]) -> pa.Schema:
        kinds: dict[str, pa.DataType] = {}
        for field in (field for schema in schemas for field in schema if not _PANDAS_INDEX.fullmatch(field.name)):
            name = self._renamed(field.name)
            kinds[name] = _common(kinds.get(name, pa.null()), _plain(field.type))
        theirs = [(name, TEXT if pa.types.is_null(kind) else kind) for name, kind in kinds.items() if name not in OURS]
        return pa.schema([*OURS.items(), *theirs, *((name, pa.int32()) for name in metadata.LINEAGE)])

    def _renamed(self, name: str) -> str:
        gives_way = name in metadata.LINEAGE or (name in RESERVED and not self._own)
        return f"json_{name}" if gives_way else name

    def rows(self, path: str) -> int:
        """The number of rows of a file."""
        return sum(self.footers[path].groups)

    def has_captions(self, path: str) -> bool:
        """Whether the file has a column of captions."""
        return "caption" in self.footers[path].schema.names

    def read(self, number: int, path: str, start: int, stop: int) -> pa.Table:
        """Rows [start, stop) of a file. A missing key becomes the image's path or, if there is none, the row number."""
        table = metadata.read_rows(self.store, path, number, start, stop)
        if not self._own:
            table = table.rename_columns([f"json_{n}" if n in RESERVED else n for n in table.column_names])
        columns = {
            field.name: _cast(table[field.name], field.type)
            if field.name in table.column_names
            else pa.nulls(len(table), field.type)
            for field in self.schema
        }
        if "caption" in table.column_names:
            columns["caption"] = caption_column(table["caption"])
        image_path = _cast(table["image_path"], TEXT) if "image_path" in table.column_names else columns["key"]
        columns["key"] = pc.coalesce(columns["key"], image_path, table[metadata.LINEAGE[1]].cast(TEXT))
        if not self._own:
            columns["shard"] = pa.repeat(self.store.display(path), len(table))
        return pa.table(columns, schema=self.schema)


def without_metadata(number: int, where: str, start: int, stop: int) -> pa.Table:
    """Rows [start, stop) of a part without metadata: their numbers as keys, `where` as their shard, and the lineage."""
    rows = pa.array(range(start, stop), pa.int32())
    columns = {name: pa.nulls(len(rows), kind) for name, kind in OURS.items()}
    columns["key"], columns["shard"] = rows.cast(TEXT), pa.repeat(where, len(rows))
    lineage = zip(metadata.LINEAGE, (pa.repeat(pa.scalar(number, pa.int32()), len(rows)), rows), strict=True)
    return pa.table({**columns, **dict(lineage)})


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type (null, bool, int64, double or string) that a column of another type is stored as."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_null(kind) or pa.types.is_boolean(kind):
        return kind
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return pa.int64()
    return pa.float64() if pa.types.is_floating(kind) else TEXT


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type that can hold the values of two plain types."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    return pa.float64() if {one, other} == {pa.int64(), pa.float64()} else TEXT


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column cast to a type; whole numbers that a double cannot hold are rounded, as pandas does."""
    if kind == TEXT:
        return text_column(column)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        return column.cast(kind, safe=not pa.types.is_floating(kind))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # an offset that is no number: clip-batch did not write it
        return pa.chunked_array([pa.nulls(len(column), kind)])
