"""What a search returns, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clip_batch.errors import one_line
from clip_batch.types import Hit


@dataclass(frozen=True)
class SearchResult:
    """The hits of a query, best first.

    `scanned` candidates were looked through. `complete` is false where a condition, heads or near duplicates left
    fewer than k of them, and deeper ones may remain.
    """

    hits: list[Hit]
    scanned: int
    complete: bool


def describe_hits(hits: Sequence[Hit]) -> str:
    """Hits as lines for people: rank, score, key, caption."""
    lines = []
    for rank, hit in enumerate(hits, 1):
        caption = one_line(hit.metadata.get("caption") or "", 100)
        lines.append(f"{rank:3d}  {hit.score:.3f}  {hit.metadata.get('key')}  {caption}".rstrip())
    return "\n".join(lines) or "no hits"
