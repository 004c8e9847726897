"""Decoding captions and JSON side-cars, with a rule for each kind of bad input."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from clip_batch.storage.text import as_caption, decode, encodable
from clip_batch.types import Sample

MAX_DEPTH = 100
"""Deepest nesting of a JSON side-car; deeper ones would exceed Python's recursion limit when written again."""


class SampleTexts(NamedTuple):
    """What lies beside an image: its caption, the fields of its JSON side-car, and warnings by name."""

    caption: str | None
    fields: dict[str, Any]
    warnings: list[str]


def decode_texts(sample: Sample, caption_field: str = "") -> SampleTexts:
    """Decode the caption and the JSON of a sample.

    With a `caption_field` the caption is that field of the JSON (of a list the first text that is not blank), otherwise
    that of the Parquet file beside the tar, and only where neither has one that of the caption file.
    """
    fields, warnings = decode_json(sample.json)
    if caption_field and (caption := field_caption(fields, caption_field) or sample.beside):
        return SampleTexts(caption, fields, warnings)
    caption, more = decode_caption(sample.caption)
    return SampleTexts(caption, fields, more + warnings)


def field_caption(fields: dict[str, Any], name: str) -> str | None:
    """The caption in a field of a JSON side-car; None if the field is absent, blank or holds no text."""
    return (as_caption(fields.get(name)) or "").strip() or None


def decode_caption(raw: bytes | None) -> tuple[str | None, list[str]]:
    """A caption, None if it is absent or blank, and its warnings: "missing_caption", "bad_utf8"."""
    if raw is None:
        return None, ["missing_caption"]
    text, undecodable = decode(raw)
    problems = ["bad_utf8"] if undecodable else []
    text = text.strip()
    return (text, problems) if text else (None, [*problems, "missing_caption"])


def decode_json(raw: bytes | None) -> tuple[dict[str, Any], list[str]]:
    """The fields of a JSON side-car, and its warnings: "bad_utf8", "bad_json", "repeated_field", "infinite_number".

    Text that is not a JSON object, or is nested deeper than MAX_DEPTH, is kept under "_raw"; so is an object with a
    field that is repeated, of which the last value holds. NaN, which Python writes for a missing value, and infinities
    become null, because JSON lacks them; lone surrogates, which UTF-8 cannot encode, become U+FFFD.

    >>> decode_json(b'{"width": 640, "score": NaN}')
    ({'width': 640, 'score': None}, [])
    """
    if raw is None:
        return {}, []
    text, undecodable = decode(raw)
    problems = {"bad_utf8": undecodable, "bad_json": False, "repeated_field": False, "infinite_number": False}

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        problems["repeated_field"] |= len(value) < len(pairs)
        return value

    try:
        value = _clean(json.loads(text, object_pairs_hook=fields), problems)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        value, problems["bad_json"] = {}, True
    if problems["bad_json"] or problems["repeated_field"]:
        value["_raw"] = text
    return value, [name for name, present in problems.items() if present]


def _clean(value: Any, problems: dict[str, bool], depth: int = 0) -> Any:
    """A parsed value without what strict JSON and UTF-8 lack; RecursionError if it is nested too deep."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, float):
        problems["infinite_number"] |= math.isinf(value)
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_clean(item, problems, depth + 1) for item in value]
    if isinstance(value, dict):
        return {encodable(name): _clean(item, problems, depth + 1) for name, item in value.items()}
    return value
