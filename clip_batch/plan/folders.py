"""Folders of files that are planned: their frozen listings, and how a folder of today differs from them.

A picture is known by its name. New pictures, and captions without one, are new samples. A picture whose file, caption
or JSON has another size or time, or that got or lost a caption, has changed; one that is not there any more is gone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from clip_batch.plan import paths
from clip_batch.plan.state import newer_inputs, newest
from clip_batch.plan.threads import map_in_threads
from clip_batch.samples import listings
from clip_batch.samples.files import Folder
from clip_batch.samples.listings import ListedSample, Version, image_of
from clip_batch.storage.names import name_text
from clip_batch.storage.store import Store
from clip_batch.types import UNREADABLE, Plan, Shard

GONE: Version = (None, "gone")
"""The version of the files of a sample whose picture was gone when its partition was embedded again."""


class PlannedPlace(NamedTuple):
    """Where a plan has a sample of a folder: its partition, the folder's shard, and the row of its listing."""

    partition: int
    shard: Shard
    row: int


class Difference(NamedTuple):
    """A planned sample that is not as it was listed, and how: `what` reads as in "a.jpg (a.txt added)"."""

    name: str
    what: str
    place: PlannedPlace
    now: ListedSample

    def __str__(self) -> str:
        return f"{self.name} ({self.what})"


@dataclass(frozen=True)
class FolderChanges:
    """How a folder of today differs from what a plan has of it.

    - `new`: its samples that the plan does not have.
    - `changed`: planned samples whose files are others.
    - `gone`: planned samples whose picture is not there.
    """

    new: list[ListedSample] = field(default_factory=list)
    changed: list[Difference] = field(default_factory=list)
    gone: list[Difference] = field(default_factory=list)


class _Planned(NamedTuple):
    sample: ListedSample
    place: PlannedPlace


def shards_of(plan: Plan) -> dict[str, list[Shard]]:
    """The folders of a plan by URL, with the shard of each generation."""
    found: dict[str, list[Shard]] = {}
    for partition in plan.partitions:
        for piece in partition.slices:
            shards = found.setdefault(piece.shard.url, [])
            if piece.shard not in shards:
                shards.append(piece.shard)
    return found


def is_listed(plan: Plan, url: str) -> bool:
    """Whether what a plan has of a folder is known by frozen listings, as of all plans that this version made."""
    return all(listings.is_frozen(shard) for shard in shards_of(plan).get(url, []) if shard.samples is not None)


def planned_names(store: Store, plan: Plan, url: str) -> set[str]:
    """What the samples are known by that the plan of an output has of a folder with frozen listings."""
    return {known_as(one.sample, plan.image_extensions) for one in _planned(store, plan, url)}


def freeze_folder(url: str, samples: Sequence[ListedSample]) -> tuple[Shard, bytes]:
    """The shard of a folder that has these samples alone, and the file of its listing."""
    etag, data = listings.freeze(samples)
    return Shard(url, None, etag, len(samples)), data


def freeze_folders(shards: Sequence[Shard], folders: Mapping[str, Folder]) -> tuple[list[Shard], dict[str, bytes]]:
    """The shards of folders with listings of all that is in them, and the files of these, by the shards' versions."""
    frozen: list[Shard] = []
    files: dict[str, bytes] = {}
    for shard in shards:
        if shard.etag != UNREADABLE:
            now = folders[shard.url]
            shard, data = freeze_folder(shard.url, list(listings.listed(now.samples, now.versions)))
            files[shard.etag or ""] = data
        frozen.append(shard)
    return frozen, files


def write_listings(store: Store, files: Mapping[str, bytes]) -> None:
    """Write the files of listings, by the versions of their shards, to an output."""

    def write(etag: str) -> None:
        store.create(f"{paths.LISTINGS}/{listings.file_name(etag)}", files[etag])

    for _ in map_in_threads(write, list(files)) if files else ():
        pass


def compare_folder(store: Store, plan: Plan, url: str, now: Folder) -> FolderChanges:
    """How a folder of today, listed with versions, differs from what the plan of an output has of it."""
    images, text_alone = plan.image_extensions, "image" not in plan.modalities
    planned = {known_as(one.sample, images): one for one in _planned(store, plan, url)}
    alone = {name for key, one in planned.items() if key.startswith("\0") for name in one.sample.files}
    changes, present = FolderChanges(), set[str]()
    for sample in listings.listed(now.samples, now.versions):
        name = known_as(sample, images)
        present.add(name)
        if (old := planned.get(name)) is None:
            # A caption that was embedded by itself is not embedded again because its picture came.
            if not (text_alone and not alone.isdisjoint(sample.files)):
                changes.new.append(sample)
        elif sample.files != old.sample.files and (text_alone or not name.startswith("\0")):
            what, now_listed = _what(old.sample.files, sample.files), sample._replace(key=old.sample.key)
            changes.changed.append(Difference(_shown(name), what, old.place, now_listed))
    for name, old in planned.items():
        came = name.startswith("\0") and all(file in now.versions for file in old.sample.files)  # its picture, that is
        if name not in present and not came and not _is_gone(old.sample):
            gone = ListedSample(old.sample.key, dict.fromkeys(old.sample.files, GONE))
            changes.gone.append(Difference(_shown(name), "not there", old.place, gone))
    return changes


def _planned(store: Store, plan: Plan, url: str) -> Iterator[_Planned]:
    """The samples that a plan has of a folder, as they were last embedded."""
    newer = newer_inputs(store)
    for partition in plan.partitions:
        for piece in partition.slices:
            if piece.shard.url == url and listings.is_frozen(piece.shard):
                shard = newest(piece.shard, newer.get(partition.id, {}))
                samples = listings.read_all(plan.listings, shard.etag or "", store.options, piece.start, piece.stop)
                for row, sample in enumerate(samples, piece.start):
                    yield _Planned(sample, PlannedPlace(partition.id, shard, row))


def known_as(sample: ListedSample, images: Collection[str]) -> str:
    """What a sample is known by: the name of its picture, or its key after a character that no name has."""
    return image_of(sample.files, images) or f"\0{sample.key}"


def _is_gone(sample: ListedSample) -> bool:
    return GONE in sample.files.values()


def sample_name(sample: ListedSample, images: Collection[str]) -> str:
    """The name of a sample's picture, or else its key, for messages."""
    return _shown(known_as(sample, images))


def _shown(name: str) -> str:
    return name_text(name.removeprefix("\0"))


def _what(old: Mapping[str, Version], now: Mapping[str, Version]) -> str:
    """What changed of a sample's files."""
    if GONE in old.values():
        return "there again"
    whats = [f"{name_text(name)} added" for name in now if name not in old]
    whats += [f"{name_text(name)} removed" for name in old if name not in now]
    for name in old:
        if name in now and old[name] != now[name]:
            (was, _), (size, _) = old[name], now[name]
            whats.append(f"{was:,} -> {size:,} bytes" if None not in (was, size) and was != size else "rewritten")
    return ", ".join(whats)
