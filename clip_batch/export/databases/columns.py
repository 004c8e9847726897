"""Metadata columns in the form that every SQL database accepts: their names, one of four kinds, and their values."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

Kind = Literal["string", "int64", "double", "bool"]

_TAKEN = {"id", "tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"}
"""Names that a metadata column cannot have: our row id's and those of PostgreSQL's system columns."""

_LONGEST = 50
"""Largest length of a name in bytes. PostgreSQL cuts names at 63 bytes, and a number may have to be appended."""


@dataclass(frozen=True)
class Column:
    """A metadata column: its name in the index, its name in the SQL table, and the kind of its values."""

    name: str
    sql: str
    kind: Kind


def columns_of(schema: pa.Schema) -> tuple[Column, ...]:
    """Return the SQL table's columns, in the order of the metadata schema.

    A name stays as it is if every database accepts it. Names that differ in case alone are numbered, characters that
    some database rejects become `_`, and reserved names become json_<name>.
    """
    used = set(_TAKEN)
    columns = []
    for field in schema:
        plain = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff\U00010000-\U0010ffff]", "_", field.name)
        plain = plain.encode()[:_LONGEST].decode(errors="ignore").rstrip(" ") or "column"
        plain = f"json_{plain}" if plain.lower() in _TAKEN else plain
        name, number = plain, 2
        while name.casefold() in used:
            name, number = f"{plain}_{number}", number + 1
        used.add(name.casefold())
        columns.append(Column(field.name, name, _kind(field.type)))
    return tuple(columns)


def schema_of(columns: Sequence[Column]) -> pa.Schema:
    """Return the schema of the metadata that is read from these columns."""
    kinds = {"string": pa.string(), "int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_()}
    return pa.schema([(column.name, kinds[column.kind]) for column in columns])


def _kind(kind: pa.DataType) -> Kind:
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return "int64"
    return "double" if pa.types.is_floating(kind) else "string"


def values(table: pa.Table, columns: Sequence[Column], nul: bool = True) -> list[list[Any]]:
    """Return the values of a table's columns as SQL can store them, one list per column.

    NaN and infinities become null, as in the service's answers. Values other than texts, numbers and bools become
    text (lists and structs become JSON). If `nul` is false, the character U+0000 becomes U+FFFD.
    """
    return [_column_values(table[column.name], column.kind, nul) for column in columns]


def _column_values(column: pa.ChunkedArray, kind: Kind, nul: bool) -> list[Any]:
    if kind == "double":
        doubles = column.cast(pa.float64())
        return list(pc.if_else(pc.is_finite(doubles), doubles, None).to_pylist())
    cells = column.to_pylist()
    if kind == "string":
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            cells = [_text(value) for value in cells]
        if not nul:
            cells = [value.replace("\0", "\ufffd") if value and "\0" in value else value for value in cells]
    return list(cells)


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else str(value)
