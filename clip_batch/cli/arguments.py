"""The arguments that several commands share, and how commands answer."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from clip_batch.errors import ConfigError

CommandLine = Callable[[Sequence[str]], int]
"""Runs a command given as words, and returns its exit code; `submit` gives SLURM's tasks this."""


@dataclass(frozen=True)
class Only:
    """Annotates a config section of which a command has some flags alone; files and the environment fill the rest."""

    flags: tuple[str, ...]


@dataclass(frozen=True)
class Without:
    """Annotates a config section of which a command lacks some flags, as another section has them."""

    flags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class JsonArguments:
    """How a command answers."""

    json: bool = False
    """Answer in JSON on standard output."""


@dataclass(frozen=True, kw_only=True)
class OutputArguments:
    """The embeddings folder that a command works on."""

    output: str
    """The embeddings folder OUT: a path, or any URL that fsspec opens."""


@dataclass(frozen=True, kw_only=True)
class IndexArguments:
    """The index that a command works on."""

    index: list[str]
    """The index folder INDEX, given once: a path, or any URL that fsspec opens."""

    @property
    def index_folder(self) -> str:
        """INDEX. ConfigError: several are given."""
        if len(self.index) != 1:
            raise ConfigError("--index INDEX is needed, once: the index folder")
        return self.index[0]


def escape_output() -> None:
    """Let both output streams escape the characters that their encoding lacks, as in \\u706b, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever replaces them, in a notebook or a test, has its own ways
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print progress, for people, on standard error."""
    print(text, file=sys.stderr, flush=True)


def say_next(command: str) -> None:
    """Name the command that comes next, to people at a terminal."""
    if sys.stderr and sys.stderr.isatty():
        say(f"next: {command}")


def answer(arguments: JsonArguments, value: Any, text: str) -> None:
    """Print the result on standard output: `value` with --json, otherwise `text`."""
    print(to_json(value) if arguments.json else text, flush=True)


def to_json(value: Any) -> str:
    """A value as JSON that standard output can encode: NaN and infinity are null, and ASCII escapes what it lacks."""
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(_finite(value), indent=1, allow_nan=False)
    return text


def _finite(value: Any) -> Any:
    """A copy of a value for JSON in which numbers that JSON lacks are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
