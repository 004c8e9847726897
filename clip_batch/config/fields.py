"""What the fields of a dataclass of options say: their help texts, which stand beneath them in the source."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import reprlib
import textwrap
import typing
from typing import Any, TypeVar

from clip_batch.config.values import NotAllowed, bounds, checked, rule
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


def meaning(section: type, field: str) -> str:
    """A field's help text, with its bounds if it has some."""
    allowed = bounds(bounded_hints(section)[field])
    return helps(section)[field] + (f" ({allowed})" if allowed else "")


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

    @classmethod
    def expect(cls, **given: object) -> None:
        """Raise ConfigError where a program gives something else as this section; the names are its arguments'."""
        for name, value in given.items():
            if not isinstance(value, cls):
                raise ConfigError(f"{name} is {reprlib.repr(value)}: it must be of clip_batch.{cls.__name__}")

    def __post_init__(self) -> None:
        section: Any = type(self)
        for field in dataclasses.fields(section):
            value, kind = getattr(self, field.name), bounded_hints(section)[field.name]
            try:
                right = checked(value, kind)
            except NotAllowed:
                wrong = f"{section.__name__}: {field.name} is {reprlib.repr(value)}"
                raise ConfigError(f"{wrong}: it must be {rule(kind, value)}") from None
            if right is not value:
                object.__setattr__(self, field.name, right)


@functools.cache
def bounded_hints(section: type) -> dict[str, Any]:
    """Field name -> its type, annotated with the bounds of its values."""
    return typing.get_type_hints(section, include_extras=True)


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
