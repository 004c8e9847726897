"""Compares the input of today with a plan: what is new, and what is not as it was planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from clip_batch.errors import some
from clip_batch.types import UNREADABLE, Plan, Shard, counted

SHOWN = 3
"""Inputs that a message names."""


@dataclass(frozen=True)
class Growth:
    """How input differs from a plan.

    - `new`: shards that the plan does not have, in order.
    - `differences`: how the rest is not as it was planned, one phrase each.
    """

    new: list[Shard] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @property
    def named(self) -> str:
        """How many inputs are new, and which; "" where none is."""
        return named(len(self.new), "input", "added", [shard.url for shard in self.new]) if self.new else ""

    @property
    def phrases(self) -> list[str]:
        """All differences, what is new among them."""
        return [*([self.named] if self.new else []), *self.differences]


def named(count: int, noun: str, what: str, names: Sequence[str]) -> str:
    """One phrase about inputs: how many they are, and some of their names."""
    return f"{counted(count, noun)} {what}: {some(names, SHOWN)}"


def planned_shards(plan: Plan) -> dict[str, Shard]:
    """The shards of a plan by their URLs, in its order."""
    return {piece.shard.url: piece.shard for partition in plan.partitions for piece in partition.slices}


def compare_files(plan: Plan, shards: Sequence[Shard]) -> Growth:
    """How tars or Parquet files differ from those of a plan, by their names, sizes and etags, and in their order.

    A folder that could not be listed when it was planned stays a failure: what is in it now is new.
    """
    old, now = planned_shards(plan), {shard.url: shard for shard in shards}
    removed = [url for url, shard in old.items() if url not in now and shard.etag != UNREADABLE]
    changed = [
        f"{url} ({old[url].size} -> {shard.size} bytes)" if old[url].size != shard.size else f"{url} (rewritten)"
        for url, shard in now.items()
        if url in old and (old[url].size, old[url].etag) != (shard.size, shard.etag)
    ]
    kinds = {"removed": removed, "changed": changed}
    differences = [named(len(urls), "input", kind, urls) for kind, urls in kinds.items() if urls]
    if not differences and not in_order(plan, list(now)):
        differences = ["inputs in another order"]
    return Growth([shard for shard in shards if shard.url not in old], differences)


def in_order(plan: Plan, urls: Sequence[str]) -> bool:
    """Whether the inputs of each generation have the order in which they were planned."""
    places = {url: place for place, url in enumerate(urls)}
    last = (0, -1)
    for partition in plan.partitions:
        start = plan.generation(partition.id).start
        for piece in partition.slices:
            at = start, places.get(piece.shard.url, -1)
            if at[1] >= 0 and at < last:
                return False
            last = max(last, at)
    return True
