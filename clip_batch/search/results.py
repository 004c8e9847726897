"""What a search returns, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence

from clip_batch.errors import one_line
from clip_batch.types import Hit


def describe_hits(hits: Sequence[Hit]) -> str:
    """Hits as lines for people: rank, score, key, caption."""
    lines = []
    for rank, hit in enumerate(hits, 1):
        caption = one_line(hit.metadata.get("caption") or "", 100)
        lines.append(f"{rank:3d}  {hit.score:.3f}  {hit.metadata.get('key')}  {caption}".rstrip())
    return "\n".join(lines) or "no hits"
