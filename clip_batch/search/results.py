"""What a search returns, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clip_batch.config import html
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

    def _repr_html_(self) -> str:
        note = "" if self.complete else f"there may be more: {self.scanned:,} candidates were looked through"
        return html.pictures(self.hits, Hit.image, note)


def describe_hits(hits: Sequence[Hit], columns: Sequence[str] = ()) -> str:
    """Hits as lines for people: rank, score, and these columns, key and caption by default."""
    lines = []
    for rank, hit in enumerate(hits, 1):
        names = [name for name in columns or ("key", "caption") if columns or name in hit.metadata]
        values = ["" if hit.metadata[name] is None else one_line(hit.metadata[name], 100) for name in names]
        lines.append("  ".join([f"{rank:3d}", f"{hit.score:.3f}", *values]).rstrip())
    return "\n".join(lines) or "no hits"
