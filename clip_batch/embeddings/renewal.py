"""Committed partitions that are embedded again, because their input changed or failed samples are to be tried again.

The old commit counts until the new one takes its place by name: at all times every sample is a row or a failure. A
partition keeps its number and its slices; the commit says which shards were read in another version than planned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from clip_batch.embeddings.commits import read_commits
from clip_batch.errors import ConfigError, InputError, some
from clip_batch.plan.folders import Difference, FolderChanges, compare_folder, freeze_folder, is_listed, write_listings
from clip_batch.plan.specs import present_versions
from clip_batch.plan.state import newest
from clip_batch.samples import listings
from clip_batch.samples.files import list_samples
from clip_batch.samples.listings import Version
from clip_batch.storage.names import name_text
from clip_batch.storage.store import Store
from clip_batch.types import SAMPLE_REASONS, SHARD_REASONS, UNREADABLE, Commit, Partition, Plan, Shard, counted

CHANGED, GONE = "changed", "gone"
"""What is asked for as if it were a reason: input that is not as it was embedded, and pictures that are not there."""


class Renewal(NamedTuple):
    """A partition that is embedded again, with its shards as they are now.

    - `attempt`: the attempt whose commit is replaced, "" where there is none; if another commit is there by then, it
      stays.
    - `inputs`: `Commit.inputs` of the new commit.
    """

    partition: Partition
    attempt: str
    inputs: dict[str, Version]


@dataclass
class PresentInput:
    """How the input of committed partitions differs from what was embedded.

    - `shards`: by partition, the versions that its tars or Parquet files have now, where they are others, by URL.
    - `changed`, `gone`: by partition, the samples of folders whose files are others, or are not there.
    """

    shards: dict[int, dict[str, Version]] = field(default_factory=dict)
    changed: dict[int, list[Difference]] = field(default_factory=lambda: defaultdict(list))
    gone: dict[int, list[Difference]] = field(default_factory=lambda: defaultdict(list))

    def problem(self, number: int) -> str | None:
        """What differs in the input of a partition, as one phrase; None where nothing does."""
        phrases = [f"{url} has changed since" for url in self.shards.get(number, {})]
        for found, what in ((self.changed, "changed since"), (self.gone, "gone")):
            if one := found.get(number):
                names = [str(difference) if what != "gone" else difference.name for difference in one]
                phrases.append(f"{counted(len(one), 'picture')} {what}: {some(names, 3)}")
        return "; ".join(phrases) or None


def check_reasons(reasons: Collection[str]) -> None:
    """ConfigError: one of them is no reason of a failure, nor `CHANGED` or `GONE`."""
    known = (CHANGED, GONE, *sorted(SAMPLE_REASONS | SHARD_REASONS))
    if unknown := [reason for reason in reasons if reason not in known]:
        raise ConfigError(f"--retry-failed {unknown[0]} is no reason of a failure: they are {', '.join(known)}")


def present_input(store: Store, plan: Plan, commits: Mapping[int, Commit]) -> PresentInput:
    """Compare the input of partitions, as it was embedded or else planned, with what is there now, without reading it.

    Each tar is asked for its size and version, and each folder is listed.
    """
    return _present_folders(store, plan) if plan.format == "files" else _present_files(store, plan, commits)


def _present_files(store: Store, plan: Plan, commits: Mapping[int, Commit]) -> PresentInput:
    present = PresentInput()
    embedded = {partition.id: _shards(partition, commits.get(partition.id)) for partition in plan.partitions}
    now = present_versions({shard.url for shards in embedded.values() for shard in shards}, store.options)
    for number, shards in embedded.items():
        others = {shard.url: now[shard.url] for shard in shards if now[shard.url] not in (None, _version(shard))}
        if others:
            present.shards[number] = {url: version for url, version in others.items() if version}
    return present


def _shards(partition: Partition, commit: Commit | None) -> list[Shard]:
    """The shards of a partition in the versions that were embedded, without folders that could not be listed."""
    inputs = commit.inputs if commit else {}
    return [newest(piece.shard, inputs) for piece in partition.slices if piece.shard.etag != UNREADABLE]


def _version(shard: Shard) -> Version:
    return shard.size, shard.etag


def _present_folders(store: Store, plan: Plan) -> PresentInput:
    present = PresentInput()
    shards = (piece.shard for partition in plan.partitions for piece in partition.slices)
    for url in dict.fromkeys(shard.url for shard in shards if listings.is_frozen(shard)):
        changes = _changes(store, plan, url) if is_listed(plan, url) else FolderChanges()
        for one in changes.changed:
            present.changed[one.place.partition].append(one)
        for one in changes.gone:
            present.gone[one.place.partition].append(one)
    return present


def _changes(store: Store, plan: Plan, url: str) -> FolderChanges:
    now = list_samples(url, plan.image_extensions, plan.caption_extensions, store.options, versions=True)
    return compare_folder(store, plan, url, now)


def renewals(store: Store, plan: Plan, reasons: Collection[str]) -> dict[int, Renewal]:
    """The partitions to embed with their input as it is now: with failures for these reasons, or changed or gone input.

    Listings of folders that changed are written. InputError: a tar changed of which a partition has a slice alone.
    """
    check_reasons(reasons)
    commits = {number: commit for number, commit in read_commits(store).items() if number < len(plan.partitions)}
    present = present_input(store, plan, commits)
    numbers = {number for number, commit in commits.items() if not {*commit.failed}.isdisjoint(reasons)}
    if CHANGED in reasons:
        numbers |= {*present.shards, *present.changed}
    if GONE in reasons:
        numbers |= {*present.gone}
    newer = {number: dict(present.shards.get(number, {})) for number in sorted(numbers)}
    differences = [one for found in (present.changed, present.gone) for ones in found.values() for one in ones]
    for number, url, version in _relisted(store, plan, [one for one in differences if one.place.partition in newer]):
        newer[number][url] = version
    _check_whole(plan, newer)
    return {number: _renewal(plan.partitions[number], commits.get(number), newer[number]) for number in newer}


def _relisted(store: Store, plan: Plan, differences: Sequence[Difference]) -> list[tuple[int, str, Version]]:
    """Write listings of folders as they are now; the version of a partition's folder, by partition and URL."""
    by_shard: dict[Shard, list[Difference]] = defaultdict(list)
    for one in differences:
        by_shard[one.place.shard].append(one)
    newer: list[tuple[int, str, Version]] = []
    for shard, found in by_shard.items():
        rows = list(listings.read_all(plan.listings, shard.etag or "", store.options))
        for one in found:
            rows[one.place.row] = one.now
        frozen, data = freeze_folder(shard.url, rows)
        write_listings(store, {frozen.etag or "": data})
        newer += [(number, shard.url, _version(frozen)) for number in {one.place.partition for one in found}]
    return newer


def _check_whole(plan: Plan, newer: Mapping[int, Mapping[str, Version]]) -> None:
    cut = {
        piece.shard.url
        for number, versions in newer.items()
        for piece in plan.partitions[number].slices
        if plan.format != "files" and piece.shard.url in versions and not piece.whole
    }
    if cut:
        raise InputError(
            f"{some(sorted(cut))} changed, and was planned in slices, whose places are those of the former file: "
            "put that file back, or plan the new one into another output"
        )


def _renewal(partition: Partition, commit: Commit | None, newer: Mapping[str, Version]) -> Renewal:
    inputs = {name_text(url): version for url, version in newer.items()}
    inputs = {**commit.inputs, **inputs} if commit else inputs
    pieces = tuple(replace(piece, shard=newest(piece.shard, inputs)) for piece in partition.slices)
    return Renewal(replace(partition, slices=pieces), commit.attempt if commit else "", inputs)
