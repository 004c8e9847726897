"""status --index: which version is live and what it holds, which merges are unfinished, and what to type next."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from shlex import quote
from typing import Any

from clip_batch.errors import ClipBatchError, CorruptError
from clip_batch.index import kept, publications, removals
from clip_batch.index.ann.recall import Recall
from clip_batch.index.manifest import DRIFT, Manifest, MergedOutput, load_manifest
from clip_batch.index.paths import VersionPaths
from clip_batch.index.removed_rows import removed_if_known
from clip_batch.index.versions import folders_of, show_recall, show_time
from clip_batch.plan.state import commit_names
from clip_batch.storage.store import Store
from clip_batch.types import counted, format_bytes, format_numbers

STALE = 3600
"""Seconds without a sign of life after which the command of an unfinished merge is what to type next."""


@dataclass(frozen=True)
class MergeProgress:
    """An unfinished version, and what the records of its merge's tasks say.

    `replaces` is the version that was live when it was trained. `shards` and `rows` are those that it will have, 0
    where that is not known: before it is trained, or from an older release. `eta_seconds` is by the rate of the shards
    that are built; None without one. `idle_seconds` have passed since the last file was written; None where the store
    does not tell. `command` runs the merge, or what is left of it. `outrun` is an addition to a version that is no
    longer live: it cannot go live itself, and its merge begins again from the one that is.
    """

    version: str
    trained: bool
    replaces: str | None
    shards_built: int
    shards: int
    rows: int
    rows_per_second: float
    eta_seconds: int | None
    idle_seconds: int | None
    command: str
    outrun: bool


@dataclass(frozen=True)
class IndexStatus:
    """The state of INDEX; the JSON of `clip-batch status --index INDEX --json` has the same keys.

    `version` is the live one (None: there is none), `live_since` in Unix seconds (None: the log does not know).
    `removed` counts its rows that are removed, None where that is not known without a scan. `recall` is by modality and
    kind of query, `drift` that of the rows added last, `retrain` whether they do not fit the trained lists.
    `problems` are what `verify --index` finds wrong with CURRENT and the log; `deleting` are versions whose deletion
    was not completed. `next` are the commands that are due. `rows_of` has the rows of each OUT, by its URL, that are in
    the live version.
    """

    index: str
    version: str | None
    live_since: float | None
    rows: int
    removed: int | None
    removal_lists: int
    bytes: int
    sources: tuple[MergedOutput, ...]
    missing: tuple[int, ...]
    encoder: str
    key: dict[str, str]
    recall: dict[str, dict[str, Recall]]
    recall_target: float
    drift: dict[str, dict[str, float]]
    retrain: bool
    merges: tuple[MergeProgress, ...] = ()
    other_versions: int = 0
    deleting: tuple[str, ...] = ()
    problems: dict[str, str] = field(default_factory=dict)
    next: tuple[str, ...] = ()
    rows_of: dict[str, int] = field(default_factory=dict)


def index_status(store: Store) -> IndexStatus:
    """The state of INDEX. ConfigError: there is no index, and none is being made. CorruptError: it cannot be opened."""
    problems = publications.problems(store)
    state = publications.read_state(store)
    folders = [version for version in folders_of(store) if version not in state.dropping]
    finished = {version for version in folders if publications.is_finished(store, version)}
    unfinished = [version for version in folders if version not in finished and not kept.adds_nothing(store, version)]
    merges = tuple(_progress(store, version, state.version) for version in unfinished)
    manifest = load_manifest(store, state.version) if state.version or not merges else None
    entries = [entry for entry in publications.publications(store) if entry.version != entry.replaces]
    removed = removed_if_known(store, manifest) if manifest else None
    retrain = bool(manifest and _drifted(store, manifest))
    return IndexStatus(
        index=store.url,
        version=state.version,
        live_since=entries[-1].created if entries and entries[-1].version == state.version else None,
        rows=manifest.rows if manifest else 0,
        removed=None if removed is None else len(removed),
        removal_lists=len(removals.names(store)),
        bytes=manifest.size if manifest else 0,
        sources=manifest.sources if manifest else (),
        rows_of=manifest.rows_of if manifest else {},
        missing=manifest.missing if manifest else (),
        encoder=f"{manifest.encoder.model} {manifest.encoder.pretrained}".strip() if manifest else "",
        key=manifest.key if manifest else {},
        recall=manifest.recall if manifest else {},
        recall_target=manifest.recall_target if manifest else 0.0,
        drift=manifest.drift if manifest else {},
        retrain=retrain,
        merges=merges,
        other_versions=len(finished - {state.version}),
        deleting=state.dropping,
        problems=problems,
        next=tuple(_next(store, manifest, retrain, merges, bool(state.dropping))),
    )


def _progress(store: Store, version: str, live: str | None) -> MergeProgress:
    """What is known of an unfinished version."""
    paths, now = VersionPaths(version), time.time()
    record = _record(store, paths.template_record)
    written = {name: _modified(store, f"{version}/{name}") for name in store.files(version)}
    known = [when for when in written.values() if when is not None]
    records = [name for name in written if name.startswith("shards/")]
    built = [each for name in records if (each := _record(store, f"{version}/{name}"))]
    ends = [when for name in records if (when := written[name]) is not None]
    trained_at = _modified(store, paths.template_record) if record else None
    done = sum(int(each.get("rows", 0)) for each in built)
    seconds = max(ends) - trained_at if ends and trained_at else sum(float(each.get("seconds", 0)) for each in built)
    shards, rows = int(record.get("shards", 0)), int(record.get("rows", 0))
    rate = done / max(seconds, 1e-3)
    left = rows * (shards - len(built)) / shards if shards else 0.0
    return MergeProgress(
        version,
        trained=bool(record),
        replaces=record.get("replaces"),
        shards_built=len(built),
        shards=shards,
        rows=rows,
        rows_per_second=round(rate, 1),
        eta_seconds=round(left / rate) if rate and shards else None,
        idle_seconds=max(0, round(now - max(known))) if known else None,
        command=str(record.get("command", "")),
        outrun=bool(record.get("reference")) and "replaces" in record and record["replaces"] != live,
    )


def _record(store: Store, name: str) -> dict[str, Any]:
    """The record of a merge task; {} where there is none, or it is damaged."""
    with contextlib.suppress(CorruptError):
        return kept.read_record(store, name)
    return {}


def _modified(store: Store, name: str) -> float | None:
    with contextlib.suppress(FileNotFoundError):  # its merge goes on meanwhile
        return store.modified(name)
    return None


def _drifted(store: Store, manifest: Manifest) -> bool:
    """Whether the rows that were added last do not fit the trained lists, as merge tells when it adds them."""
    before = manifest.recall
    with contextlib.suppress(ClipBatchError):
        before = load_manifest(store, manifest.base).recall if manifest.base else before
    return any(
        value < before[modality][kind]["10"] - DRIFT
        for modality, by_kind in manifest.drift.items()
        for kind, value in by_kind.items()
        if kind in before.get(modality, {})
    )


def _next(
    store: Store, manifest: Manifest | None, retrain: bool, merges: tuple[MergeProgress, ...], deleting: bool
) -> Iterator[str]:
    """The commands that are due."""
    for merge in merges:
        if merge.command and not merge.outrun and (merge.idle_seconds is None or merge.idle_seconds > STALE):
            yield merge.command
    for output, source in _last(manifest.sources if manifest else ()).items():
        if source.missing and _is_complete(output, store.options, source.missing):
            yield f"clip-batch merge --add --output {quote(output)} --index {quote(store.url)}"
        elif source.missing:
            yield f"clip-batch status --output {quote(output)}"
    if retrain:
        yield f"clip-batch merge --anew --index {quote(store.url)}"
    if deleting:
        yield f"clip-batch gc --index {quote(store.url)}"
    if manifest:
        yield f"clip-batch serve --index {quote(store.url)}"


def _last(sources: Sequence[MergedOutput]) -> dict[str, MergedOutput]:
    """Each OUT as it was when it was merged last, by its URL."""
    return {source.output: source for source in sources}


def _is_complete(output: str, options: dict[str, Any], missing: Sequence[int]) -> bool:
    """Whether partitions of OUT that a merge lacked are committed now; not if nobody can tell."""
    with contextlib.suppress(ClipBatchError, OSError):
        return {*missing} <= {int(name) for name in commit_names(Store(output, options))}
    return False


def describe(status: IndexStatus) -> str:
    """A status as text for people."""
    lines = [f"{name}: {problem}" for name, problem in status.problems.items()]
    if status.version is None:
        lines.append(f"nothing is live in {status.index} yet")
    else:
        since = f" since {show_time(status.live_since)}" if status.live_since else ""
        removed = "removals not counted yet" if status.removed is None else f"{status.removed:,} removed"
        lists = f" by {counted(status.removal_lists, 'list')}" if status.removal_lists else ""
        lines.append(
            f"version {status.version} is live{since}: {counted(status.rows, 'row')}, {removed}{lists}, "
            f"{format_bytes(status.bytes)}, {status.encoder}"
        )
        for output, source in _last(status.sources).items():
            lacking = f", without partitions {format_numbers(source.missing)}" if source.missing else ""
            lines.append(f"  of {output}: {counted(status.rows_of[output], 'row')}{lacking}")
        lines += [f"  {name} {key}{show_recall(status.recall.get(name, {}))}" for name, key in status.key.items()]
        for modality, by_kind in status.drift.items():
            values = ", ".join(f"{value:.3f} for {kind} queries" for kind, value in by_kind.items())
            worse = ": they do not fit the trained lists" if status.retrain else ""
            lines.append(f"  {modality}: recall@10 of the rows added last {values}{worse}")
    lines += [_line(merge) for merge in status.merges]
    if status.other_versions:
        lines.append(f"{counted(status.other_versions, 'other version')}: clip-batch versions lists them")
    lines += [f"the deletion of version {version} was not completed" for version in status.deleting]
    return "\n".join([*lines, *(f"next: {command}" for command in status.next)])


def _line(merge: MergeProgress) -> str:
    """An unfinished merge in one line."""
    total = f" of {merge.shards}" if merge.shards else ""
    done = f"trained, {merge.shards_built}{total} index shards built" if merge.trained else "not trained yet"
    rate = f", {merge.rows_per_second:,.0f} rows/s" if merge.rows_per_second else ""
    eta = f", ETA {_duration(merge.eta_seconds)}" if merge.eta_seconds is not None else ""
    idle = "" if merge.idle_seconds is None else f", last written {_duration(merge.idle_seconds)} ago"
    if merge.outrun:
        return (
            f"version {merge.version} was outrun by another that went live: gc --index deletes it when it is old{idle}"
        )
    return f"version {merge.version} is being merged: {done}{rate}{eta}{idle}"


def _duration(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
