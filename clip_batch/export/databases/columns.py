"""Metadata columns as every SQL database takes them: names, four kinds of values, and the values themselves."""

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
"""Our row ids, and what PostgreSQL calls its own columns."""

_LONGEST = 50
"""Bytes of a name: PostgreSQL cuts at 63, and a number may have to follow."""


@dataclass(frozen=True)
class Column:
    """A metadata column: its name there, its name in the table, and what its values are."""

    name: str
    sql: str
    kind: Kind


def columns_of(schema: pa.Schema) -> tuple[Column, ...]:
    """The table's columns, in the schema's order.

    A name is kept where all databases can have it: upper and lower case do not tell two apart there, some characters
    are in none, and a few names are taken (those become json_<name>).
    """
    used = set(_TAKEN)
    found = []
    for field in schema:
        plain = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff\U00010000-\U0010ffff]", "_", field.name)
        plain = plain.encode()[:_LONGEST].decode(errors="ignore").rstrip(" ") or "column"
        plain = f"json_{plain}" if plain.lower() in _TAKEN else plain
        name, number = plain, 2
        while name.casefold() in used:
            name, number = f"{plain}_{number}", number + 1
        used.add(name.casefold())
        found.append(Column(field.name, name, _kind(field.type)))
    return tuple(found)


def schema_of(columns: Sequence[Column]) -> pa.Schema:
    """The metadata schema that a table's columns give back."""
    kinds = {"string": pa.string(), "int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_()}
    return pa.schema([(column.name, kinds[column.kind]) for column in columns])


def _kind(kind: pa.DataType) -> Kind:
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return "int64"
    return "double" if pa.types.is_floating(kind) else "string"


def values(table: pa.Table, columns: Sequence[Column], nul: bool = True) -> list[list[Any]]:
    """The values of a table's columns, a list a column, as SQL can hold them.

    NaN and infinities are null, as the service answers them; what is no text, number or bool is text (JSON, where it
    has parts). Without `nul`, the character U+0000 is U+FFFD.
    """
    return [_plain(table[column.name], column.kind, nul) for column in columns]


def _plain(column: pa.ChunkedArray, kind: Kind, nul: bool) -> list[Any]:
    if kind == "double":
        finite = column.cast(pa.float64())
        return list(pc.if_else(pc.is_finite(finite), finite, None).to_pylist())
    found = column.to_pylist()
    if kind == "string":
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            found = [_text(value) for value in found]
        if not nul:
            found = [value.replace("\0", "\ufffd") if value and "\0" in value else value for value in found]
    return list(found)


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else str(value)
