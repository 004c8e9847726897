"""Text as people's files have it: byte-order marks, undecodable bytes, lone surrogates, and values that are no text."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Mapping
from typing import Any

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with the mark of UTF-16, so it comes first
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""The byte-order marks that files begin with, and the codec that reads what follows each."""


def encoding(start: bytes) -> str:
    """Return the codec for a file that begins with these bytes: that of its byte-order mark, or UTF-8 without one."""
    return next((codec for mark, codec in MARKS.items() if start.startswith(mark)), "utf-8")


def decode(raw: bytes) -> tuple[str, bool]:
    """Return the text of a file, and whether it has bytes that its encoding does not allow: they become U+FFFD.

    >>> decode("a cat".encode("utf-16"))
    ('a cat', False)
    """
    if raw.isascii():  # as nearly all are; every mark has other bytes
        return raw.decode(), False
    codec = encoding(raw[:4])
    try:
        return raw.decode(codec), False
    except UnicodeDecodeError:
        return raw.decode(codec, "replace"), True


def encodable(text: str) -> str:
    """Return a text with U+FFFD in place of lone surrogates, which JSON may hold and UTF-8 cannot encode."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def as_text(value: Any) -> str | None:
    """Return a value of a table or of JSON as text: lists and objects as JSON, null and NaN as None.

    >>> as_text(["a", b"b", float("nan")]), as_text(float("nan")), as_text(True)
    ('["a", "b", null]', None, 'true')
    """
    simple = plain(value)
    return simple if simple is None or isinstance(simple, str) else json.dumps(simple, ensure_ascii=False)


def as_caption(value: Any) -> str | None:
    """Return a value as a caption: of a list the first item that gives one and is not blank; objects give none.

    >>> as_caption(["", "a cat", "a pet"]), as_caption({"en": "a cat"}), as_caption(7)
    ('a cat', None, '7')
    """
    simple = plain(value)
    if isinstance(simple, list):
        return next((text for item in simple if (text := as_caption(item)) and not text.isspace()), None)
    return None if isinstance(simple, dict) else as_text(simple)


def plain(value: Any) -> Any:
    """Return a value in terms of strict JSON."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {encodable(str(name)): plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else str(value)
