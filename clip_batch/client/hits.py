"""`ServiceHits`: the hits of one search, with what the service says of it."""

from __future__ import annotations

from collections.abc import Iterable

from clip_batch.config import html
from clip_batch.types import Hit


class ServiceHits(list[Hit]):
    """The hits of one search, best first: a list, with what the service says of the search.

    The index `index_name`, in its `version`, was searched. `scanned` candidates were looked through; `complete` is
    false where a limit left fewer than k hits, and there may be more. `with_image` are the ids of the hits whose image
    the service has.
    """

    def __init__(
        self,
        hits: Iterable[Hit] = (),
        index_name: str = "",
        version: str = "",
        scanned: int = 0,
        complete: bool = True,
        with_image: Iterable[int] = (),
    ) -> None:
        super().__init__(hits)
        self.index_name, self.version, self.scanned, self.complete = index_name, version, scanned, complete
        self.with_image = frozenset(with_image)

    def _repr_html_(self) -> str:
        note = "" if self.complete else f"there may be more: {self.scanned:,} candidates were looked through"
        return html.pictures(self, lambda hit: hit.image() if hit.id in self.with_image else None, note)
