"""Conditions on metadata columns, as a tree.

    And((Compare("license", "=", "cc0"), Compare("width", ">", 512)))

`clip_batch.search.where.parse_where` returns this tree for `license = "cc0" and width > 512`, and `str` of a condition
returns such a text. `clip_batch.search.evaluate` says which rows match.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from clip_batch.errors import ConfigError

Value: TypeAlias = bool | int | float | str
Operator = Literal["=", "!=", "<", "<=", ">", ">="]
OPERATORS: tuple[Operator, ...] = get_args(Operator)

KEYWORDS = frozenset({"and", "or", "not", "in", "contains", "is", "null", "true", "false"})
"""Words, in upper or lower case, that are column names only if they are quoted."""

NAME = r"[^\W\d][\w.\-]*"
"""Pattern of the column names that need no quotes."""


@dataclass(frozen=True, slots=True)
class Compare:
    """A column's value compares with a value as the operator says. Text is ordered by code points."""

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
        if not set(map(type, self.values)) <= {str, int, bool}:  # a quick look, as there may be very many
            for value in self.values:
                _check_value(self.column, value)

    def __str__(self) -> str:
        return f"{_name(self.column)} in ({', '.join(map(_literal, self.values))})"


@dataclass(frozen=True, slots=True)
class Contains:
    """A column's text contains a text, ignoring case."""

    column: str
    text: str

    def __str__(self) -> str:
        return f"{_name(self.column)} contains {_quoted(self.text)}"


@dataclass(frozen=True, slots=True)
class IsNull:
    """A column's value is null or NaN."""

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
    """Return the condition that all of these are true. None entries are skipped; None if nothing remains."""
    parts = tuple(condition for condition in conditions if condition is not None)
    return And(parts) if len(parts) > 1 else parts[0] if parts else None


def columns_in(condition: Condition) -> list[str]:
    """Return the names of the columns that a condition reads, each once, in the order of its text."""
    return list(dict.fromkeys(_columns(condition)))


def _columns(condition: Condition) -> Iterator[str]:
    if isinstance(condition, Not):
        yield from _columns(condition.part)
    elif isinstance(condition, And | Or):
        for part in condition.parts:
            yield from _columns(part)
    else:
        yield condition.column


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
