"""Paths and URLs as programs give them: a str, or a path object such as pathlib.Path."""

from __future__ import annotations

import os

from clip_batch.errors import ConfigError


def path_text(value: object, what: str) -> str:
    """A path or URL as a str. ConfigError: the value is neither that nor a path object; `what` names it."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{what} is {value!r}: it must be a path or a URL")
    return text
