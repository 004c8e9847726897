"""The text of a condition, as `--where` and `where=` take it, read into the tree of `clip_batch.search.conditions`.

    condition    conjunction { or conjunction }
    conjunction  negation { and negation }
    negation     not negation | ( condition ) | comparison
    comparison   column = value          (also != < <= > >=)
                 column [not] in ( value, ... )
                 column [not] contains text
                 column is [not] null
    column       a name of letters, digits, _ . and -, or any name in quotes
    value        text | number | true | false
    text         "..." or '...'; a quote within is written twice

The words are taken in upper or lower case. `not` binds before `and`, and `and` before `or`.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn, TypeAlias

from clip_batch.errors import ConfigError
from clip_batch.search.conditions import (
    KEYWORDS,
    NAME,
    OPERATORS,
    And,
    Compare,
    Condition,
    Contains,
    In,
    IsNull,
    Not,
    Or,
    Value,
    all_of,
)
from clip_batch.search.filters import Filter, parse_filter

Where: TypeAlias = str | Condition | Sequence[Filter | Mapping[str, object]]
"""A condition as text, as a tree, or as the `filters` of /v1/search, of which all must hold."""

DEEPEST = 100
"""Brackets and `not` within each other that a text may have."""

_TOKEN = re.compile(
    rf"""\s*(?:
        (?P<string> "(?:[^"]|"")*" | '(?:[^']|'')*' )
      | (?P<number> [+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]) )
      | (?P<name> {NAME} )
      | (?P<sign> [=<>!]=|<>|[=<>(),] )
      | (?P<end> $ )
    )""",
    re.VERBOSE,
)

_SPELLED = {"==": "=", "<>": "!=", "=<": "<=", "=>": ">="}
"""Other languages' operators, and ours."""


def as_condition(where: Where | None) -> Condition | None:
    """The condition that any form of `where` means; None for None, an empty text and no filters. ConfigError: wrong."""
    if where is None or isinstance(where, Condition):
        return where
    if isinstance(where, str):
        return parse_where(where) if where.strip() else None
    if isinstance(where, bytes | Mapping) or not isinstance(where, Iterable):
        raise ConfigError(f"where is {reprlib.repr(where)}: it must be a condition as text, or a list of filters")
    return all_of(parse_filter(one).condition() for one in where)


def parse_where(text: str) -> Condition:
    """The condition that a text says. ConfigError: it is not understood, with the place and what to write."""
    parser = _WhereParser(text)
    condition = parser.condition()
    if parser.next.kind != "end":
        parser.fail("expected and, or, or the end")
    return condition


class _Token(NamedTuple):
    kind: str
    text: str
    start: int


class _WhereParser:
    """Reads a text token by token: one method for each line of the grammar."""

    def __init__(self, text: str) -> None:
        self._text, self._depth = text, 0
        self.next = self._read(0)

    def condition(self) -> Condition:
        parts = [self._conjunction()]
        while self._word("or"):
            parts.append(self._conjunction())
        return Or(tuple(parts)) if len(parts) > 1 else parts[0]

    def _conjunction(self) -> Condition:
        parts = [self._negation()]
        while self._word("and"):
            parts.append(self._negation())
        return And(tuple(parts)) if len(parts) > 1 else parts[0]

    def _negation(self) -> Condition:
        self._depth += 1
        if self._depth > DEEPEST:
            self.fail(f"more than {DEEPEST} brackets and not lie within each other: write fewer")
        try:
            if self._word("not"):
                return Not(self._negation())
            if not self._sign("("):
                return self._comparison()
            condition = self.condition()
            self._expect(")")
            return condition
        finally:
            self._depth -= 1

    def _comparison(self) -> Condition:
        column = self._column()
        if self.next.kind == "sign":
            for operator in OPERATORS:
                if self._sign(operator):
                    return Compare(column, operator, self._value())
        if self._word("is"):
            negative = self._word("not")
            if not self._word("null"):
                self.fail("expected null after is: to compare with a value write =")
            return Not(IsNull(column)) if negative else IsNull(column)
        negative = self._word("not")
        condition = self._membership(column)
        return Not(condition) if negative else condition

    def _membership(self, column: str) -> Condition:
        if self._word("in"):
            return In(column, self._values())
        if self._word("contains"):
            return Contains(column, self._string())
        self.fail(f"expected {', '.join(OPERATORS)}, in, contains or is null after column {column}")

    def _column(self) -> str:
        token = self.next
        if token.kind == "string":
            self._advance()
            return _unquoted(token.text)
        if token.kind != "name":
            self.fail("expected the name of a column")
        if token.text.lower() in KEYWORDS:
            self.fail(f'expected the name of a column: write "{token.text}" in quotes if it is one')
        self._advance()
        return token.text

    def _values(self) -> tuple[Value, ...]:
        self._expect("(")
        values: list[Value] = []
        while not self._sign(")"):
            if values:
                self._expect(",")
            values.append(self._value())
        return tuple(values)

    def _value(self) -> Value:
        token = self.next
        if token.kind == "string":
            return self._string()
        if token.kind == "number":
            try:
                value = int(token.text) if re.fullmatch(r"[+-]?\d+", token.text) else float(token.text)
            except ValueError:
                self.fail("this number has too many digits")
            if value in (float("inf"), float("-inf")):
                self.fail("this number is too large")
            self._advance()
            return value
        if self._word("true"):
            return True
        if self._word("false"):
            return False
        if self._is_word("null"):
            self.fail("nothing is equal to null: write is null, or is not null")
        if token.kind == "name":
            self.fail(f'expected a value: write "{token.text}" in quotes')
        self.fail("expected a value: a text in quotes, a number, true or false")

    def _string(self) -> str:
        if self.next.kind != "string":
            self.fail("expected a text in quotes")
        text = self.next.text
        self._advance()
        return _unquoted(text)

    def _is_word(self, word: str) -> bool:
        return self.next.kind == "name" and self.next.text.lower() == word

    def _word(self, word: str) -> bool:
        """Whether the next token is this keyword, which is then read."""
        matched = self._is_word(word)
        if matched:
            self._advance()
        return matched

    def _sign(self, sign: str) -> bool:
        """Whether the next token is this sign, which is then read."""
        matched = self.next.kind == "sign" and self.next.text == sign
        if matched:
            self._advance()
        return matched

    def _expect(self, sign: str) -> None:
        if not self._sign(sign):
            self.fail(f"expected {sign}")

    def _advance(self) -> None:
        self.next = self._read(self.next.start + len(self.next.text))

    def _read(self, start: int) -> _Token:
        match = _TOKEN.match(self._text, start)
        if match is None:
            start += len(self._text[start:]) - len(self._text[start:].lstrip())
            self.next = _Token("unknown", self._text[start:], start)
            quote = self._text[start] in "\"'"
            self.fail("the text has no closing quote" if quote else "expected a column, an operator or a value")
        kind = str(match.lastgroup)
        token = _Token(kind, match[kind], match.start(kind))
        if kind == "sign" and token.text in _SPELLED:
            self.next = token
            self.fail(f"{token.text} is not known here: write {_SPELLED[token.text]}")
        return token

    def fail(self, message: str) -> NoReturn:
        """ConfigError that names the place of the next token."""
        rest = " ".join(self._text[self.next.start :].split())
        at = f"at {rest[:30]!r} (character {self.next.start + 1})" if rest else "at its end"
        raise ConfigError(f"where, {at}: {message}")


def _unquoted(text: str) -> str:
    quote = text[0]
    return text[1:-1].replace(quote * 2, quote)
