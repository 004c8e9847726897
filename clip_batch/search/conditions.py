"""Conditions on metadata columns, as a tree that is evaluated over Arrow columns.

    And((Compare("license", "=", "cc0"), Compare("width", ">", 512)))

is what `clip_batch.search.where.parse_where` makes of `license = "cc0" and width > 512`; `str` of a condition is such
a text again. A comparison with null (or NaN), or with a value of another kind than the column's, is neither true nor
false, as in SQL: `not` leaves it so, and only rows of which the whole condition is true match. The kinds are text,
numbers, and true and false; columns of lists, dates and bytes have none of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clip_batch.errors import ConfigError

Value: TypeAlias = bool | int | float | str
Operator = Literal["=", "!=", "<", "<=", ">", ">="]
OPERATORS: tuple[Operator, ...] = get_args(Operator)

KEYWORDS = frozenset({"and", "or", "not", "in", "contains", "is", "null", "true", "false"})
"""Words that a column's name must be quoted to be, in upper or lower case."""

NAME = r"[^\W\d][\w.\-]*"
"""The names of columns that need no quotes."""


@dataclass(frozen=True, slots=True)
class Compare:
    """A column's value is equal to, other than, less or more than a value. Text is ordered by code points."""

    column: str
    operator: Operator
    value: Value

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise ConfigError(f"operator {self.operator!r} is not known: take one of {' '.join(OPERATORS)}")
        _check_value(self.column, self.value)

    def __str__(self) -> str:
        return f"{_name(self.column)} {self.operator} {_literal(self.value)}"


@dataclass(frozen=True, slots=True)
class In:
    """A column's value is one of several."""

    column: str
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        for value in self.values:
            _check_value(self.column, value)

    def __str__(self) -> str:
        return f"{_name(self.column)} in ({', '.join(map(_literal, self.values))})"


@dataclass(frozen=True, slots=True)
class Contains:
    """A column's text contains a text, in upper or lower case."""

    column: str
    text: str

    def __str__(self) -> str:
        return f"{_name(self.column)} contains {_quoted(self.text)}"


@dataclass(frozen=True, slots=True)
class IsNull:
    """A row has no value in a column, or NaN."""

    column: str

    def __str__(self) -> str:
        return f"{_name(self.column)} is null"


@dataclass(frozen=True, slots=True)
class Not:
    """A condition is false."""

    part: Condition

    def __str__(self) -> str:
        return f"not {_inner(self.part)}"


@dataclass(frozen=True, slots=True)
class And:
    """All of two or more conditions are true."""

    parts: tuple[Condition, ...]

    def __post_init__(self) -> None:
        _check_parts(self.parts)

    def __str__(self) -> str:
        return " and ".join(map(_inner, self.parts))


@dataclass(frozen=True, slots=True)
class Or:
    """At least one of two or more conditions is true."""

    parts: tuple[Condition, ...]

    def __post_init__(self) -> None:
        _check_parts(self.parts)

    def __str__(self) -> str:
        return " or ".join(map(_inner, self.parts))


Condition: TypeAlias = Compare | In | Contains | IsNull | Not | And | Or


def all_of(conditions: Iterable[Condition | None]) -> Condition | None:
    """The condition that all of these are true, leaving out each None; None where nothing is left."""
    parts = tuple(condition for condition in conditions if condition is not None)
    return And(parts) if len(parts) > 1 else parts[0] if parts else None


def columns_in(condition: Condition) -> list[str]:
    """The names of the columns that a condition looks at, each once, in the order of its text."""
    return list(dict.fromkeys(_columns(condition)))


def matches(condition: Condition, table: pa.Table | pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """True (n,) for the rows of a table of which the condition is true. A column that the table lacks is null."""
    batches = table.to_batches() if isinstance(table, pa.Table) else [table]
    parts = [pc.fill_null(_evaluate(condition, batch), False).to_numpy(zero_copy_only=False) for batch in batches]
    return np.concatenate([np.empty(0, dtype=bool), *parts])


def _columns(condition: Condition) -> Iterator[str]:
    if isinstance(condition, Not):
        yield from _columns(condition.part)
    elif isinstance(condition, And | Or):
        for part in condition.parts:
            yield from _columns(part)
    else:
        yield condition.column


def _evaluate(condition: Condition, batch: pa.RecordBatch) -> pa.BooleanArray:
    """True, false or null (n,) for each row of a batch."""
    if isinstance(condition, Not):
        return pc.invert(_evaluate(condition.part, batch))
    if isinstance(condition, And | Or):
        combine = pc.and_kleene if isinstance(condition, And) else pc.or_kleene
        answer = _evaluate(condition.parts[0], batch)
        for part in condition.parts[1:]:
            answer = combine(answer, _evaluate(part, batch))
        return answer
    there = condition.column in batch.schema.names
    return _leaf(condition, batch.column(condition.column) if there else pa.nulls(len(batch)))


def _leaf(condition: Compare | In | Contains | IsNull, column: pa.Array) -> pa.BooleanArray:
    """True, false or null (n,) for each value of a column; those of a dictionary are looked at once."""
    if pa.types.is_dictionary(column.type):
        if isinstance(condition, IsNull):
            return column.indices.is_null()
        return _leaf(condition, column.dictionary).take(column.indices)
    if pa.types.is_floating(column.type):
        wide = column.cast(pa.float64())
        column = pc.if_else(pc.is_nan(wide), None, wide)
    if isinstance(condition, IsNull):
        return column.is_null()
    kind = _kind_of(column.type)
    if kind is None:
        return pa.nulls(len(column), pa.bool_())
    if isinstance(condition, Contains):
        return _contains(column, condition.text) if kind is str else pa.nulls(len(column), pa.bool_())
    if isinstance(condition, In):
        return _among(column, [value for value in condition.values if _kind(value) is kind])
    if _kind(condition.value) is not kind:
        return pa.nulls(len(column), pa.bool_())
    if condition.operator in ("=", "!="):
        equal = _among(column, [condition.value])
        return equal if condition.operator == "=" else pc.invert(equal)
    return _ordered(column, condition.operator, condition.value)


def _contains(column: pa.Array, text: str) -> pa.BooleanArray:
    """By Python's casefold, which Arrow does not have, of each different value."""
    encoded, wanted = column.dictionary_encode(), text.casefold()
    holds = [wanted in value.casefold() for value in encoded.dictionary.to_pylist()]
    return pa.array(holds, pa.bool_()).take(encoded.indices)


def _among(column: pa.Array, values: Sequence[Value]) -> pa.BooleanArray:
    """Whether each value is one of some of its own kind, exactly: 2**53 + 1 is no double."""
    if _kind_of(column.type) is str:
        column, known = _as_bytes(column), [_utf8(str(value)) for value in values]
        return _where_valid(column, pc.is_in(column, pa.array(known, column.type)))
    exact = [_converted(value, column.type) for value in values]
    kept = pa.array([value for value in exact if value is not None], column.type)
    return _where_valid(column, pc.is_in(column, kept))


def _converted(value: Value, kind: pa.DataType) -> Value | None:
    """A number, true or false as a column's type has it; None where it has no such value."""
    if isinstance(value, str | bool):
        return value
    if pa.types.is_floating(kind):
        return near if (near := _nearest(value)) == value else None
    whole = int(value) if value == math.floor(value) else None
    low, high = _bounds(kind)
    return whole if whole is not None and low <= whole <= high else None


def _ordered(column: pa.Array, operator: str, value: Value) -> pa.BooleanArray:
    """Whether each value is before or behind one of its own kind, exactly."""
    if isinstance(value, str):
        column = _as_bytes(column)
        return _COMPARE[operator](column, pa.scalar(_utf8(value), column.type))
    if isinstance(value, bool):
        return _COMPARE[operator](column.cast(pa.int8()), pa.scalar(int(value), pa.int8()))
    if pa.types.is_floating(column.type):
        near = _nearest(value)
        if near != value:  # no double lies between the two
            operator = operator[0] if (near > value) == (operator[0] == "<") else f"{operator[0]}="
        return _COMPARE[operator](column, pa.scalar(near, pa.float64()))
    bound = math.floor(value) if operator in ("<=", ">") else math.ceil(value)
    low, high = _bounds(column.type)
    if not low <= bound <= high:
        return _where_valid(column, pa.repeat((bound > high) == (operator[0] == "<"), len(column)))
    return _COMPARE[operator](column, pa.scalar(bound, column.type))


_COMPARE = {"<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}


def _where_valid(column: pa.Array, answer: pa.BooleanArray) -> pa.BooleanArray:
    return pc.if_else(column.is_valid(), answer, pa.scalar(None, pa.bool_()))


def _as_bytes(column: pa.Array) -> pa.Array:
    """Text as UTF-8, whose order is that of code points."""
    return column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _nearest(value: float) -> float:
    """The double next to a number, infinite where it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _bounds(kind: pa.DataType) -> tuple[int, int]:
    """The least and the largest value of a type of integers."""
    bits = kind.bit_width
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if pa.types.is_signed_integer(kind) else (0, 2**bits - 1)


def _kind_of(kind: pa.DataType) -> type | None:
    """The kind of a column's values: bool, float (any number), str; None for all others."""
    if pa.types.is_boolean(kind):
        return bool
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return float
    return str if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def _kind(value: Value) -> type:
    return type(value) if isinstance(value, bool | str) else float


def _check_value(column: str, value: Value) -> None:
    if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"column {column} is compared with {value!r}: give a text, a finite number, true or false")


def _check_parts(parts: tuple[Condition, ...]) -> None:
    if len(parts) < 2:
        raise ConfigError(f"and, or join two or more conditions, not {len(parts)}")


def _inner(part: Condition) -> str:
    return f"({part})" if isinstance(part, And | Or) else str(part)


def _name(column: str) -> str:
    return column if re.fullmatch(NAME, column) and column.lower() not in KEYWORDS else _quoted(column)


def _literal(value: Value) -> str:
    if isinstance(value, str):
        return _quoted(value)
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'
