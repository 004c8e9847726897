"""What the value of an option may be: its type, and bounds that annotate the type.

    port: Annotated[int, Range(0, 65_535)] = 1234
    partition_count: Annotated[int, Range(1)] | None = None
    prefetch: Size = "4GB"

A number without a Range is 0 or more.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, TypeAlias

from clip_batch.config.sizes import parse_bytes
from clip_batch.errors import ClipBatchError, ConfigError


class NotAllowed(ClipBatchError):
    """A value is not one that its option may have."""


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`. Infinity is one of them only where `least` is -inf."""

    least: float = 0
    most: float = math.inf

    def allows(self, value: float) -> bool:
        """Whether a number is in the range; NaN never is."""
        return self.least <= value <= self.most and (value < math.inf or self.least == -math.inf)

    def short(self) -> str:
        """The bounds in a few words; "" where there are none."""
        if self.most < math.inf:
            return f"{self.least:,} to {self.most:,}"
        return f"{self.least:,} or more" if self.least > -math.inf else ""

    def rule(self, noun: str) -> str:
        """What a number must be; `noun` says of which kind it is."""
        if self.most < math.inf:
            return f"{noun} between {self.least:,} and {self.most:,}"
        return f"{noun}, {self.least:,} or more" if self.least > -math.inf else noun


@dataclass(frozen=True)
class Bytes:
    """Sizes that `parse_bytes` understands, of `least` bytes or more."""

    least: int = 0

    def allows(self, value: str) -> bool:
        """Whether a text is such a size."""
        try:
            return parse_bytes(value) >= self.least
        except ConfigError:
            return False

    def short(self) -> str:
        """The bound in a few words; "" where there is none."""
        return f"{self.least:,} bytes or more" if self.least else ""

    def rule(self, noun: str) -> str:
        """What a text must be."""
        return f"a size of {self.least:,} bytes or more, like 4GB" if self.least else "a size like 4GB or 512MiB"


@dataclass(frozen=True)
class Words:
    """Texts that match a pattern, which `meaning` tells people."""

    pattern: str
    meaning: str

    def allows(self, value: str) -> bool:
        """Whether a text matches as a whole."""
        return bool(re.fullmatch(self.pattern, value))

    def short(self) -> str:
        """What a text must be, in a few words."""
        return self.meaning

    def rule(self, noun: str) -> str:
        """What a text must be."""
        return self.meaning


@dataclass(frozen=True)
class Items:
    """Lists of `least` to `most` items."""

    least: int
    most: float = math.inf

    def allows(self, value: list[Any]) -> bool:
        """Whether a list has as many items."""
        return self.least <= len(value) <= self.most

    def short(self) -> str:
        """How many items a list must have, in a few words."""
        return f"{self.least} {f'to {self.most}' if self.most < math.inf else 'or more'} of them"

    def rule(self, noun: str) -> str:
        """How many items a list must have."""
        return f"{noun}, {self.short()}"


ANY = Range(-math.inf)
"""Any number but NaN."""

Count: TypeAlias = Annotated[int, Range(1)]
Share: TypeAlias = Annotated[float, Range(0, 1)]
Seconds: TypeAlias = Annotated[float, Range(0.001, 86_400)]
Threads: TypeAlias = Annotated[int, Range(0, 4096)]
"""Threads, or processes, of one machine; 0 leaves the number to the program."""
Size: TypeAlias = Annotated[str, Bytes()]
Memory: TypeAlias = Annotated[str, Bytes(1000)]
"""A size of some bytes at least: `--max-memory 8` lacks its unit."""
HostName: TypeAlias = Annotated[
    str, Words(r"\*|[\w.-]+|\[?[0-9A-Fa-f:.]+\]?", "a host's name or address, without a port, or *")
]
Device: TypeAlias = Annotated[str, Words("auto|cpu|cuda(:[0-9]+)?", "auto, cpu, cuda or cuda:N")]


def checked(value: Any, kind: Any) -> Any:
    """A value of a type with its bounds, in which path objects have become text. NotAllowed: it is none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        return _of_union(value, arguments)
    base, bound = arguments if origin is Annotated else (kind, Range() if kind in (int, float) else None)
    value = _of_type(value, base)
    if bound is not None and not bound.allows(value):
        raise NotAllowed
    return value


def _of_union(value: Any, kinds: tuple[Any, ...]) -> Any:
    for kind in kinds:
        with contextlib.suppress(NotAllowed):
            return checked(value, kind)
    raise NotAllowed


def _of_type(value: Any, kind: Any) -> Any:
    """A value of a type that is no union, whatever its bound."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if origin is list and isinstance(value, list | tuple):
        items = [checked(item, arguments[0]) for item in value]
        return value if items == value else items
    if origin is typing.Literal:
        fits = value in arguments
    elif kind in (int, float):
        fits = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    else:
        fits = isinstance(value, Mapping if origin is dict else origin or kind)
    if not fits:
        raise NotAllowed
    return value


def rule(kind: Any, value: Any = None) -> str:
    """What a value of a type must be, for people; `value` is one that it may not be."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        base, bound = arguments
        return str(bound.rule(_NOUNS.get(base) or rule(base, value)))
    if origin in _UNIONS:
        return ", or ".join(rule(one, value) for one in arguments if one is not types.NoneType)
    if origin is list:
        if isinstance(value, list | tuple):
            return f"a list, each {rule(arguments[0])}"
        return f"a list, {[value]!r}" if isinstance(value, str) else "a list"
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}" if arguments[1:] else str(arguments[0])
    noun = _NOUNS[origin or kind]
    return Range().rule(noun) if kind in (int, float) else noun


def bounds(kind: Any) -> str:
    """The bounds that annotate a type, in a few words; "" where there are none but that a number is 0 or more."""
    if typing.get_origin(kind) is Annotated:
        return str(typing.get_args(kind)[1].short())
    parts = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else ()
    return ", or ".join(filter(None, map(bounds, parts)))


_NOUNS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    dict: "a mapping",
    types.NoneType: "None",
}
_UNIONS = (typing.Union, types.UnionType)
