"""Compares the input of today with a plan: what is new, and what is not as it was planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from shlex import quote

from clip_batch.errors import some
from clip_batch.plan.folders import Difference, compare_folder, freeze_folder, is_listed, sample_name, shards_of
from clip_batch.plan.state import newer_inputs, newest
from clip_batch.samples import listings
from clip_batch.samples.files import Folder
from clip_batch.storage.store import Store
from clip_batch.types import UNREADABLE, Plan, Shard, counted

SHOWN = 3
"""Inputs that a message names."""


@dataclass
class Growth:
    """How input differs from a plan.

    - `new`: shards that the plan does not have, in order; of folders that grew, with listings of what is new alone.
    - `added`: how many inputs, or pictures of folders, that is, and which.
    - `differences`: how the rest is not as it was planned, one phrase each.
    - `changed`, `gone`: planned samples of folders whose files are others, or are not there.
    - `listings`: the files of the listings of new shards, by the shards' versions.
    - `rewritten`: whether planned tars or Parquet files have another content, all of which `repair` can embed again.
    """

    new: list[Shard] = field(default_factory=list)
    added: str = ""
    differences: list[str] = field(default_factory=list)
    changed: list[Difference] = field(default_factory=list)
    gone: list[Difference] = field(default_factory=list)
    listings: dict[str, bytes] = field(default_factory=dict)
    rewritten: bool = False

    @property
    def moved(self) -> list[str]:
        """One phrase each about pictures that changed, and that are gone."""
        kinds = {"changed since": self.changed, "gone": self.gone}
        return [
            named(len(found), "planned picture", kind, [str(one) if kind != "gone" else one.name for one in found])
            for kind, found in kinds.items()
            if found
        ]

    @property
    def phrases(self) -> list[str]:
        """All differences, what is new among them."""
        return [*([self.added] if self.new else []), *self.differences, *self.moved]


def moved_lines(growth: Growth, output: str) -> list[str]:
    """Lines that say which planned pictures changed or are gone, and what can be done about it."""
    remedies = {"changed": "embeds them again, as run does", "gone": "takes their rows out, which stay until then"}
    words = ["changed"] * bool(growth.changed) + ["gone"] * bool(growth.gone)
    command = retry_command(output)
    return [f"{what}: {command} {word} {remedies[word]}" for what, word in zip(growth.moved, words, strict=True)]


def retry_command(output: str) -> str:
    """The command that embeds changed input again, less the reason, for people."""
    return f"clip-batch repair --output {quote(output)} --retry-failed"


def named(count: int, noun: str, what: str, names: Sequence[str]) -> str:
    """One phrase about inputs: how many they are, and some of their names."""
    return f"{counted(count, noun)} {what}: {some(names, SHOWN)}"


def planned_shards(store: Store, plan: Plan) -> dict[str, Shard]:
    """The shards of the plan of an output by their URLs, in its order, with the versions that they were embedded in."""
    newer = newer_inputs(store)
    return {
        piece.shard.url: newest(piece.shard, newer.get(partition.id, {}))
        for partition in plan.partitions
        for piece in partition.slices
    }


def compare(store: Store, plan: Plan, shards: Sequence[Shard], folders: Mapping[str, Folder]) -> Growth:
    """How shards differ from those of the plan of an output.

    `folders` has what is in them, with versions, where they are folders of files.
    """
    return _compare_folders(store, plan, shards, folders) if plan.format == "files" else _compare(store, plan, shards)


def _compare(store: Store, plan: Plan, shards: Sequence[Shard]) -> Growth:
    """Compare tars or Parquet files by their names, sizes and etags, and by their order.

    A folder that could not be listed when it was planned stays a failure: what is in it now is new.
    """
    old, now = planned_shards(store, plan), {shard.url: shard for shard in shards}
    other = {url for url in now if url in old and (old[url].size, old[url].etag) != (now[url].size, now[url].etag)}
    changed = [
        f"{url} ({old[url].size} -> {shard.size} bytes)" if old[url].size != shard.size else f"{url} (rewritten)"
        for url, shard in now.items()
        if url in other
    ]
    slices = [piece for partition in plan.partitions for piece in partition.slices if piece.shard.url in other]
    kinds = {"removed": _removed(old, now), "changed": changed}
    differences = [named(len(urls), "input", kind, urls) for kind, urls in kinds.items() if urls]
    if not differences and not _in_order(plan, list(now)):
        differences = ["inputs in another order"]
    new = [shard for shard in shards if shard.url not in old]
    added = named(len(new), "input", "added", [shard.url for shard in new])
    return Growth(new, added, differences, rewritten=bool(other) and all(piece.whole for piece in slices))


def _removed(old: Mapping[str, Shard], now: Mapping[str, object]) -> list[str]:
    return [url for url, shard in old.items() if url not in now and shard.etag != UNREADABLE]


def _compare_folders(store: Store, plan: Plan, shards: Sequence[Shard], folders: Mapping[str, Folder]) -> Growth:
    """Compare folders of files by the files in them. Pictures that changed or are gone differ, but refuse nothing."""
    old, growth, added = shards_of(plan), Growth(), list[str]()
    removed = _removed({url: found[-1] for url, found in old.items()}, {shard.url: shard for shard in shards})
    changed = list[str]()
    for shard in shards:
        known = [one for one in old.get(shard.url, []) if one.etag != UNREADABLE]
        if shard.etag == UNREADABLE:
            if shard.url not in old:
                growth.new.append(shard)
                added.append(shard.url)
            continue
        if known and not is_listed(plan, shard.url):
            if known[-1].etag != shard.etag:
                changed.append(f"{shard.url} (planned by an older version, which knew its names alone)")
            continue
        now = folders[shard.url]
        if known:
            changes = compare_folder(store, plan, shard.url, now)
            growth.changed += changes.changed
            growth.gone += changes.gone
            new = changes.new
        else:
            new = list(listings.listed(now.samples, now.versions))
        if new:
            frozen, data = freeze_folder(shard.url, new)
            growth.new.append(frozen)
            growth.listings[frozen.etag or ""] = data
            added += [sample_name(sample, plan.image_extensions) for sample in new]
    kinds = {"removed": removed, "changed": changed}
    growth.differences = [named(len(urls), "input", kind, urls) for kind, urls in kinds.items() if urls]
    if not growth.differences and not _in_order(plan, [shard.url for shard in shards]):
        growth.differences = ["inputs in another order"]
    growth.added = named(len(added), "picture", "added", added) if added else ""
    return growth


def _in_order(plan: Plan, urls: Sequence[str]) -> bool:
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
