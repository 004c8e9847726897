"""Tables and pictures as HTML, for notebooks. All text is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clip_batch.errors import one_line
from clip_batch.types import Hit

MOST_HITS = 50
"""Hits that are shown; the others are counted."""

MOST_BYTES = 2**20
"""Bytes of the largest picture file that is put into a notebook as it is."""

_STARTS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "gif", b"BM": "bmp"}


def table(rows: Mapping[str, Any]) -> str:
    """A table of names and values, of those that are not empty."""
    cells = [(name, value) for name, value in rows.items() if value not in (None, "", [], {})]
    lines = [f"<tr><th style='text-align:left'>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in cells]
    return f"<table>{''.join(lines)}</table>"


def pictures(hits: Sequence[Hit], image: Callable[[Hit], bytes | None], note: str = "") -> str:
    """Hits as pictures side by side, each with its score and its caption or key; `image` reads a picture file."""
    shown = "".join(_figure(hit, image) for hit in hits[:MOST_HITS]) or "no hits"
    more = f"<p>and {len(hits) - MOST_HITS:,} more</p>" if len(hits) > MOST_HITS else ""
    note = f"<p>{_text(note)}</p>" if note else ""
    return f"<div style='display:flex;flex-wrap:wrap;gap:8px'>{shown}</div>{more}{note}"


def _figure(hit: Hit, image: Callable[[Hit], bytes | None]) -> str:
    try:
        data = image(hit)
    except Exception:  # a picture that cannot be had must not hide the hits
        data = None
    caption = next((hit.metadata[name] for name in ("caption", "key", "url") if hit.metadata.get(name)), "")
    text = f"<small>{hit.score:.3f} <span title='row {int(hit.id)}'>{_text(one_line(caption, 80))}</span></small>"
    return f"<div style='width:144px;overflow-wrap:anywhere'>{_picture(data)}{text}</div>"


def _picture(data: bytes | None) -> str:
    kind = media_kind(data or b"")
    if data is None or kind is None or len(data) > MOST_BYTES:
        return "<div style='height:96px;color:gray'>no picture to show</div>"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f"<img style='max-width:144px;max-height:144px;display:block' src='{source}'>"


def media_kind(data: bytes) -> str | None:
    """The name of a format that browsers show as a picture and never run; None of any other."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:12] == b"ftypavif":
        return "avif"
    return next((kind for start, kind in _STARTS.items() if data.startswith(start)), None)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        value = ", ".join(f"{name}: {item}" for name, item in value.items())
    elif isinstance(value, float):
        value = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return html.escape(str(value))
