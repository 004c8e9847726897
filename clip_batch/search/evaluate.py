"""Evaluation of conditions over Arrow columns.

A comparison with null (or NaN), or with a value of another kind than the column's, is neither true nor false, as in
SQL: `not` leaves it so, and only rows for which the whole condition is true match. The kinds are text, numbers, and
booleans; columns of lists, dates and bytes have none of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clip_batch.search.conditions import And, Compare, Condition, Contains, In, IsNull, Not, Or, Value


def matches(condition: Condition, table: pa.Table | pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """Return bool (n,): for which rows of a table the condition is true. A column that the table lacks is all null."""
    batches = table.to_batches() if isinstance(table, pa.Table) else [table]
    parts = [pc.fill_null(_evaluate(condition, batch), False).to_numpy(zero_copy_only=False) for batch in batches]
    return np.concatenate([np.empty(0, dtype=bool), *parts])


def _evaluate(condition: Condition, batch: pa.RecordBatch) -> pa.BooleanArray:
    """Return true, false or null (n,) for the rows of a batch."""
    if isinstance(condition, Not):
        return pc.invert(_evaluate(condition.part, batch))
    if isinstance(condition, And | Or):
        combine = pc.and_kleene if isinstance(condition, And) else pc.or_kleene
        answer = _evaluate(condition.parts[0], batch)
        for part in condition.parts[1:]:
            answer = combine(answer, _evaluate(part, batch))
        return answer
    exists = condition.column in batch.schema.names
    return _leaf(condition, batch.column(condition.column) if exists else pa.nulls(len(batch)))


def _leaf(condition: Compare | In | Contains | IsNull, column: pa.Array) -> pa.BooleanArray:
    """Return true, false or null (n,) for the values of a column. Each value of a dictionary is evaluated once."""
    if pa.types.is_dictionary(column.type):
        if isinstance(condition, IsNull):
            return column.indices.is_null()
        return _leaf(condition, column.dictionary).take(column.indices)
    if pa.types.is_floating(column.type):
        wide = column.cast(pa.float64())
        column = pc.if_else(pc.is_nan(wide), None, pc.add(wide, 0.0))  # a sum of -0.0 and 0.0 is 0.0
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
    """Return whether each value contains the text, ignoring case.

    Each distinct value is compared once, with Python's casefold, which Arrow does not have.
    """
    encoded, folded = column.dictionary_encode(), text.casefold()
    contained = [folded in value.casefold() for value in encoded.dictionary.to_pylist()]
    return pa.array(contained, pa.bool_()).take(encoded.indices)


def _among(column: pa.Array, values: Sequence[Value]) -> pa.BooleanArray:
    """Return whether each value is one of `values`, which are of its kind. Exact: 2**53 + 1 equals no double."""
    if _kind_of(column.type) is str:
        column, known = _as_bytes(column), [_utf8(str(value)) for value in values]
        return _where_valid(column, pc.is_in(column, pa.array(known, column.type)))
    exact = [_converted(value, column.type) for value in values]
    kept = pa.array([value for value in exact if value is not None], column.type)
    return _where_valid(column, pc.is_in(column, kept))


def _converted(value: Value, kind: pa.DataType) -> Value | None:
    """Return the value as a column's type represents it; None where the type has no equal value."""
    if isinstance(value, str | bool):
        return value
    if pa.types.is_floating(kind):
        return near if (near := _nearest(value)) == value else None
    whole = int(value) if value == math.floor(value) else None
    low, high = _bounds(kind)
    return whole if whole is not None and low <= whole <= high else None


def _ordered(column: pa.Array, operator: str, value: Value) -> pa.BooleanArray:
    """Return whether each value is less or greater than `value`, which is of its kind. Exact for all numbers."""
    if isinstance(value, str):
        column = _as_bytes(column)
        return _COMPARE[operator](column, pa.scalar(_utf8(value), column.type))
    if isinstance(value, bool):
        return _COMPARE[operator](column.cast(pa.int8()), pa.scalar(int(value), pa.int8()))
    if pa.types.is_floating(column.type):
        near = _nearest(value)
        if near != value:  # no double lies between `near` and `value`
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
    """Return text as UTF-8 bytes, which sort by code point."""
    return column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _nearest(value: float) -> float:
    """Return the double nearest to a number; infinity where the number is too large, and 0.0 for -0.0."""
    try:
        return float(value) + 0.0
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _bounds(kind: pa.DataType) -> tuple[int, int]:
    """Return the smallest and the largest value of an integer type."""
    bits = kind.bit_width
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if pa.types.is_signed_integer(kind) else (0, 2**bits - 1)


def _kind_of(kind: pa.DataType) -> type | None:
    """Return the kind of a column's values: bool, float (any number) or str; None for other types."""
    if pa.types.is_boolean(kind):
        return bool
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return float
    return str if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def _kind(value: Value) -> type:
    """Return the kind of a value: bool, float (any number) or str."""
    return type(value) if isinstance(value, bool | str) else float
