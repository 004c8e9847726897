"""Conditions over Arrow columns agree with Python's comparisons, row by row; null and other kinds never match."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.errors import ConfigError
from clip_batch.search.conditions import (
    OPERATORS,
    And,
    Compare,
    Condition,
    Contains,
    In,
    IsNull,
    Not,
    Or,
    all_of,
    columns_in,
)
from clip_batch.search.evaluate import matches
from clip_batch.search.filters import Filter

BIG = [2**53, 2**53 + 1, 2**53 - 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 10**400, -(10**400)]
TEXTS = ["", "a", "A", "b", "Straße", "STRASSE", "\uffff", "🦊", "a\0", "é", "3"]

texts = st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
whole = st.integers(-4, 4) | st.sampled_from(BIG)
fractions = st.sampled_from([0.0, -0.0, 0.5, 2.5, 3.0, 0.1, 2.0**53, 2.0**63, 1.7e308, -1e300, 5e-324]) | st.floats(
    allow_nan=False, allow_infinity=False
)
constants = st.one_of(st.booleans(), whole, fractions, texts, st.just("\ud800"))

COLUMNS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "int64": (pa.int64(), st.integers(-4, 4) | st.sampled_from([n for n in BIG if -(2**63) <= n < 2**63])),
    "uint64": (pa.uint64(), st.integers(0, 4) | st.sampled_from([2**53 + 1, 2**63, 2**64 - 1])),
    "int8": (pa.int8(), st.integers(-128, 127)),
    "double": (pa.float64(), st.floats(width=64) | fractions),
    "float": (pa.float32(), st.floats(width=32)),
    "flag": (pa.bool_(), st.booleans()),
    "text": (pa.string(), texts),
    "large": (pa.large_string(), texts),
    "tags": (pa.list_(pa.string()), st.lists(texts, max_size=2)),
    "nothing": (pa.null(), st.none()),
}
names = st.sampled_from([*COLUMNS, "coded", "absent"])

leaves = st.one_of(
    st.builds(Compare, names, st.sampled_from(OPERATORS), constants),
    st.builds(In, names, st.lists(constants, max_size=4).map(tuple)),
    st.builds(Contains, names, texts | st.just("\ud800")),
    st.builds(IsNull, names),
)
conditions: st.SearchStrategy[Condition] = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(And, st.lists(inner, min_size=2, max_size=3).map(tuple)),
        st.builds(Or, st.lists(inner, min_size=2, max_size=3).map(tuple)),
    ),
    max_leaves=6,
)
rows = st.lists(
    st.fixed_dictionaries(
        {name: st.none() | values for name, (_, values) in COLUMNS.items()} | {"coded": st.none() | texts}
    ),
    max_size=8,
)

_PYTHON = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge
}  # fmt: skip


def kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, int | float) else type(value).__name__


def holds(condition: Condition, row: Mapping[str, Any]) -> bool | None:
    """Evaluate a condition on one row with Python's comparisons: true, false, or None for neither."""
    if isinstance(condition, Not):
        inner = holds(condition.part, row)
        return None if inner is None else not inner
    if isinstance(condition, And | Or):
        decisive = isinstance(condition, Or)
        parts = [holds(part, row) for part in condition.parts]
        return decisive if decisive in parts else None if None in parts else not decisive
    value = row.get(condition.column)
    if isinstance(value, float) and math.isnan(value):
        value = None
    if isinstance(condition, IsNull):
        return value is None
    if kind(value) not in ("bool", "number", "str"):
        return None
    if isinstance(condition, Contains):
        return condition.text.casefold() in value.casefold() if isinstance(value, str) else None
    if isinstance(condition, In):
        return any(kind(value) == kind(one) and value == one for one in condition.values)
    if kind(value) != kind(condition.value):
        return None
    return bool(_PYTHON[condition.operator](value, condition.value))


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    columns = {name: pa.array([row[name] for row in rows], kind) for name, (kind, _) in COLUMNS.items()}
    coded = pa.array([row["coded"] for row in rows], pa.string()).dictionary_encode()
    return pa.table({**columns, "coded": coded})


@settings(max_examples=200)
@given(conditions, rows)
def test_columns_are_judged_as_rows_are(condition: Condition, rows: list[dict[str, Any]]) -> None:
    table = table_of(rows)
    single = [{**row, **{name: table[name][at].as_py() for name in ("float",)}} for at, row in enumerate(rows)]
    assert matches(condition, table).tolist() == [holds(condition, row) is True for row in single]


@settings(max_examples=200)
@given(st.sampled_from([name for name in COLUMNS if name != "tags"]), st.sampled_from(OPERATORS), constants, rows)
def test_one_comparison(column: str, operator: Any, value: Any, rows: list[dict[str, Any]]) -> None:
    condition = Compare(column, operator, value)
    table = table_of(rows)
    values = table[column].to_pylist()
    for asked in (condition, Not(condition)):
        right = [holds(asked, {column: value}) is True for value in values]
        assert matches(asked, table).tolist() == right


@given(rows, st.data())
def test_a_filter_of_v1_means_what_it_did(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    """A filter with equals, in, contains or a range, and a value of the column's kind, never null."""
    column = data.draw(st.sampled_from([name for name in COLUMNS if name != "float"]))
    bounds = constants.filter(lambda value: not isinstance(value, bool))
    given = data.draw(
        st.one_of(
            st.fixed_dictionaries({"equals": constants}),
            st.fixed_dictionaries({"in": st.lists(constants, max_size=3)}),
            st.fixed_dictionaries({"contains": texts}),
            st.fixed_dictionaries({"min": bounds, "max": bounds}),
            st.fixed_dictionaries({"min": bounds}),
            st.fixed_dictionaries({"max": bounds}),
        )
    )

    def met(value: Any) -> bool:
        if value is None:
            return False
        same = [one for one in [given.get("equals"), *given.get("in", [])] if kind(one) == kind(value)]
        if "equals" in given or "in" in given:
            return value in same
        if "contains" in given:
            return isinstance(value, str) and given["contains"].casefold() in value.casefold()
        low, high = given.get("min", value), given.get("max", value)
        return kind(low) == kind(value) == kind(high) and bool(low <= value <= high)

    condition = Filter.model_validate({"column": column, **given}).condition()
    assert matches(condition, table_of(rows)).tolist() == [met(row[column]) for row in rows]


def test_chunks_and_empty_tables() -> None:
    condition = Compare("a", ">", 2)
    table = pa.table({"a": pa.chunked_array([pa.array([1, 5]), pa.array([], pa.int64()), pa.array([None, 3])])})
    assert matches(condition, table).tolist() == [False, True, False, True]
    assert matches(condition, table.slice(0, 0)).dtype == bool
    assert len(matches(condition, pa.table({"a": pa.array([], pa.int64())}))) == 0


def test_the_columns_of_a_condition() -> None:
    condition = And((Compare("b", "=", 1), Not(Or((IsNull("a"), In("b", (2,)), Contains("c", "x"))))))
    assert columns_in(condition) == ["b", "a", "c"]
    assert all_of([]) is all_of([None]) is None
    assert all_of([None, condition]) is condition
    assert all_of([IsNull("a"), condition]) == And((IsNull("a"), condition))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, [1], np.int64(3), b"x"])
def test_values_of_no_kind_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="column a is compared with"):
        Compare("a", "=", value)
    with pytest.raises(ConfigError, match="column a is compared with"):
        In("a", (1, value))


def test_wrong_trees_are_refused() -> None:
    with pytest.raises(ConfigError, match="operator '~' is not known: take one of = !="):
        Compare("a", "~", 1)  # type: ignore[arg-type]
    for joined in (And, Or):
        with pytest.raises(ConfigError, match="two or more"):
            joined((IsNull("a"),))


@pytest.mark.parametrize(
    "condition", [Compare("x", "=", 0), Compare("x", "=", -0.0), In("x", (0.0,)), In("x", (-0.0,))]
)
def test_the_two_zeros_are_equal(condition: Condition) -> None:
    assert matches(condition, pa.table({"x": [0.0, -0.0, 1.0, None]})).tolist() == [True, True, False, False]
