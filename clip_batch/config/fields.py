"""What the fields of a dataclass of options say: their help texts, which stand beneath them in the source."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import os
import re
import reprlib
import textwrap
import types
import typing
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

from clip_batch.errors import ConfigError


@functools.cache
def helps(section: type) -> dict[str, str]:
    """Field name -> the string beneath it in the source, on one line; fields of base classes come first."""
    texts: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if dataclasses.is_dataclass(base):
            (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(node, ast.ClassDef)
            texts |= _helps(node)
    return texts


def _helps(node: ast.ClassDef) -> dict[str, str]:
    texts = {}
    for field, text in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


class Options:
    """Base of the sections, which also programs make: their values are checked as those of flags are.

    A path object in place of a text is taken as its path. ConfigError names the field, the value and what it must be.
    """

    def __post_init__(self) -> None:
        section: Any = type(self)
        hints = _hints(section)
        for field in dataclasses.fields(section):
            value, kind = getattr(self, field.name), hints[field.name]
            try:
                checked = _checked(value, kind)
                rule = _range(field, checked)
            except _Wrong as error:
                rule = str(error)
            if rule:
                raise ConfigError(f"{section.__name__}: {field.name} is {reprlib.repr(value)}: it must be {rule}")
            if checked is not value:
                object.__setattr__(self, field.name, checked)


class _Wrong(Exception):
    """A value is not of its field's type; the message is the rule that it breaks."""


def _checked(value: Any, kind: Any) -> Any:
    """A value of a type, in which path objects have become text. _Wrong: it is of another type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return value if value is None else _checked_union(value, arguments)
    if origin is list:
        if not isinstance(value, list | tuple):
            raise _Wrong(f"a list, {[value]!r}" if isinstance(value, str) else "a list")
        items = [_checked(item, arguments[0]) for item in value]
        return value if items == value else items
    if origin is typing.Literal:
        if value not in arguments:
            raise _Wrong(f"one of {', '.join(map(str, arguments))}")
    elif origin is dict:
        if not isinstance(value, Mapping):
            raise _Wrong("a mapping")
    elif kind is str:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            raise _Wrong("a text")
    elif kind is bool:
        if not isinstance(value, bool):
            raise _Wrong("True or False")
    elif not isinstance(value, Integral if kind is int else Real) or isinstance(value, bool):
        raise _Wrong("a whole number" if kind is int else "a number")
    return value


def _checked_union(value: Any, kinds: tuple[Any, ...]) -> Any:
    """A value of one of several types. _Wrong: it is of none of them."""
    rules = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return _checked(value, kind)
            except _Wrong as error:
                rules.append(str(error))
    raise _Wrong(" or ".join(rules))


_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]+)?")


def _range(field: dataclasses.Field[Any], value: Any) -> str:
    """The rule that a value of the right type breaks; "" where it breaks none.

    A number is 0 or more, unless the field's metadata has "negative".
    """
    if field.name == "device" and not _DEVICE.fullmatch(value):
        return "auto, cpu, cuda or cuda:N"
    if not isinstance(value, Real) or isinstance(value, bool):
        return ""
    if math.isnan(value):
        return "a number"
    return "0 or more" if value < 0 and not field.metadata.get("negative") else ""


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


Section = TypeVar("Section")


def documented(section: type[Section]) -> type[Section]:
    """Decorate a dataclass so that `help` and `__doc__` show the help text of each field."""
    section.__doc__ = _Docstring(section.__doc__ or "")  # type: ignore[assignment]
    return section


class _Docstring:
    """A docstring that is completed when it is read: parsing the source is too slow for every import."""

    def __init__(self, summary: str) -> None:
        self._summary = summary

    def __get__(self, instance: object, section: type) -> str:
        try:
            texts = helps(section)
        except OSError:  # there is no source
            return self._summary
        lines = [f"{name}\n{textwrap.fill(text, 92, **_INDENTED)}" for name, text in texts.items()]
        return "\n".join([self._summary, "", *lines])


_INDENTED: Any = {"initial_indent": "    ", "subsequent_indent": "    "}


def required(field: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def default(field: dataclasses.Field[Any]) -> Any:
    """A field's default value; None where it has none."""
    if required(field):
        return None
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def show(value: Any) -> str:
    """A value as people write it in a file or on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
