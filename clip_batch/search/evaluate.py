"""Evaluation of conditions over Arrow columns.

A comparison with null (or NaN), or with a value of another kind than the column's, is neither true nor false, as in
SQL: `not` leaves it so, and only rows for which the whole condition is true match. The kinds are text, numbers, and
booleans; columns of lists, dates and bytes have none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clip_batch.search.conditions import And, Compare, Condition, Contains, In, IsNull, Not, Or, Value

Leaf: TypeAlias = Compare | In | Contains | IsNull

Check: TypeAlias = Callable[[], None]
"""Called every now and then by what may take long; it raises an error where the work is to end."""

SLICE = 10_000
"""Values that are compared in Python between two calls of a Check."""


def unchecked() -> None:
    """The Check of work that may take as long as it does."""


def matches(condition: Condition, table: pa.Table | pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """Return bool (n,): for which rows of a table the condition is true. A column that the table lacks is all null."""
    return Evaluator(condition).matches(table)


class Evaluator:
    """Evaluates a condition on tables that share their dictionaries; each value of a dictionary is evaluated once."""

    def __init__(self, condition: Condition, check: Check = unchecked) -> None:
        self._condition, self._check = condition, check
        self._known: dict[tuple[int, ...], tuple[pa.Array, pa.Array]] = {}
        self._sets: dict[tuple[int, pa.DataType], pa.Array] = {}

    def matches(self, table: pa.Table | pa.RecordBatch) -> npt.NDArray[np.bool_]:
        """As `clip_batch.search.evaluate.matches`. Raises what the Check raises."""
        if isinstance(table, pa.RecordBatch):
            table = pa.Table.from_batches([table])
        true: npt.NDArray[np.bool_] = pc.fill_null(self._evaluate(self._condition, table), False).to_numpy()
        return true

    def _evaluate(self, condition: Condition, table: pa.Table) -> pa.ChunkedArray:
        """Return true, false or null (n,) for the rows of a table."""
        if isinstance(condition, Not):
            return pc.invert(self._evaluate(condition.part, table))
        if isinstance(condition, And | Or):
            combine = pc.and_kleene if isinstance(condition, And) else pc.or_kleene
            answer = self._evaluate(condition.parts[0], table)
            for part in condition.parts[1:]:
                answer = combine(answer, self._evaluate(part, table))
            return answer
        self._check()
        if condition.column not in table.schema.names:
            return self._leaf(condition, pa.chunked_array([pa.nulls(len(table))]))
        return self._leaf(condition, table.column(condition.column))

    def _leaf(self, condition: Leaf, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Return true, false or null (n,) for the values of a column."""
        if not pa.types.is_dictionary(column.type):
            return self._plain(condition, column)
        if isinstance(condition, IsNull):
            return pa.chunked_array([chunk.indices.is_null() for chunk in column.chunks], pa.bool_())
        answers = [self._of_values(condition, chunk.dictionary).take(chunk.indices) for chunk in column.chunks]
        return pa.chunked_array(answers, pa.bool_())

    def _of_values(self, condition: Leaf, values: pa.Array) -> pa.Array:
        """Return `_leaf` of a dictionary's values, which are kept so that their memory is no other dictionary's."""
        key = (id(condition), values.offset, len(values), *(buffer.address for buffer in values.buffers() if buffer))
        if key not in self._known:
            answer = self._plain(condition, pa.chunked_array([values]))
            self._known[key] = values, answer.combine_chunks()
        return self._known[key][1]

    def _plain(self, condition: Leaf, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Return `_leaf` of a column without dictionary."""
        if pa.types.is_floating(column.type):
            wide = column.cast(pa.float64())
            column = pc.if_else(pc.is_nan(wide), None, pc.add(wide, 0.0))  # a sum of -0.0 and 0.0 is 0.0
        if isinstance(condition, IsNull):
            return column.is_null()
        kind = _kind_of(column.type)
        if kind is None:
            return _all_null(column)
        if isinstance(condition, Contains):
            return _contains(column, condition.text, self._check) if kind is str else _all_null(column)
        if isinstance(condition, In) or condition.operator in ("=", "!="):
            if isinstance(condition, Compare) and _kind(condition.value) is not kind:
                return _all_null(column)
            among = _where_valid(column, pc.is_in(_comparable(column), self._values(condition, column.type)))
            return among if isinstance(condition, In) or condition.operator == "=" else pc.invert(among)
        return (
            _ordered(column, condition.operator, condition.value)
            if _kind(condition.value) is kind
            else _all_null(column)
        )

    def _values(self, condition: In | Compare, kind: pa.DataType) -> pa.Array:
        """Return the values of a condition that a column of a type can equal, as the column has them."""
        key = id(condition), kind
        if key not in self._sets:
            self._sets[key] = _value_set(condition.values if isinstance(condition, In) else [condition.value], kind)
        return self._sets[key]


def _all_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([pa.nulls(len(column), pa.bool_())])


def _contains(column: pa.ChunkedArray, text: str, check: Check) -> pa.ChunkedArray:
    """Return whether each value contains the text, ignoring case as Python's casefold does.

    Arrow compares the values that are ASCII; of others each distinct one is compared in Python.
    """
    folded = text.casefold()
    column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    answer = pc.match_substring(column, folded if folded.isascii() else "", ignore_case=True)
    if not folded.isascii():
        answer = pc.and_(answer, False)
    other = pc.fill_null(pc.invert(pc.string_is_ascii(column)), False)
    if not pc.any(other).as_py():
        return pa.chunked_array([answer])
    encoded = column.filter(other).dictionary_encode()
    contained: list[bool] = []
    for start in range(0, len(encoded.dictionary), SLICE):
        check()
        contained += [folded in value.casefold() for value in encoded.dictionary.slice(start, SLICE).to_pylist()]
    return pa.chunked_array(
        [pc.replace_with_mask(answer, other, pa.array(contained, pa.bool_()).take(encoded.indices))]
    )


def _value_set(values: Sequence[Value], kind: pa.DataType) -> pa.Array:
    """Return the values that a column of a type can equal, for `_comparable`. Exact: 2**53 + 1 equals no double."""
    fitting = [value for value in values if _kind(value) is _kind_of(kind)]
    if _kind_of(kind) is str:
        return pa.array([_utf8(str(value)) for value in fitting], _bytes_type(kind))
    exact = [_converted(value, kind) for value in fitting]
    return pa.array([value for value in exact if value is not None], kind)


def _converted(value: Value, kind: pa.DataType) -> Value | None:
    """Return the value as a column's type represents it; None where the type has no equal value."""
    if isinstance(value, str | bool):
        return value
    if pa.types.is_floating(kind):
        return near if (near := _nearest(value)) == value else None
    whole = int(value) if value == math.floor(value) else None
    low, high = _bounds(kind)
    return whole if whole is not None and low <= whole <= high else None


def _ordered(column: pa.ChunkedArray, operator: str, value: Value) -> pa.ChunkedArray:
    """Return whether each value is less or greater than `value`, which is of its kind. Exact for all numbers."""
    if isinstance(value, str):
        column = _comparable(column)
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
        return _where_valid(column, pa.scalar((bound > high) == (operator[0] == "<")))
    return _COMPARE[operator](column, pa.scalar(bound, column.type))


_COMPARE = {"<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}


def _where_valid(column: pa.ChunkedArray, answer: pa.ChunkedArray | pa.Scalar) -> pa.ChunkedArray:
    return pc.if_else(column.is_valid(), answer, pa.scalar(None, pa.bool_()))


def _comparable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return text as UTF-8 bytes, which sort by code point; other columns as they are."""
    return column.cast(_bytes_type(column.type)) if _kind_of(column.type) is str else column


def _bytes_type(kind: pa.DataType) -> pa.DataType:
    return pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()


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
