"""The versions of an index: list them, make another one live, delete old ones.

A version is a folder of 12 hex digits; it is finished once it has a manifest. `clip_batch.index.publications` knows
which one is live.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from shlex import quote

from clip_batch.errors import ConfigError, CorruptError
from clip_batch.index import kept
from clip_batch.index.ann.recall import Recall
from clip_batch.index.manifest import Manifest, MergedOutput, load_manifest
from clip_batch.index.paths import VersionPaths, is_version
from clip_batch.index.publications import (
    Publication,
    State,
    append,
    is_finished,
    live_version,
    mend,
    publications,
    publish,
    read_state,
)
from clip_batch.index.removed_rows import fetch_metadata, removed_ids, removed_if_known
from clip_batch.storage.store import Store
from clip_batch.types import StoredFile, counted, format_bytes


@dataclass(frozen=True)
class LivePeriod:
    """A version was live from `start` to `end`, in Unix seconds; `end` is None while it is."""

    start: float
    end: float | None


@dataclass(frozen=True)
class VersionInfo:
    """One version. `created`, `rows`, `key`, `recall`, `base`, `template` and `sources` are the manifest's.

    `alive` counts the rows that are not removed; None where that is not known without a scan. `bytes` are those of its
    own files, and `shared_bytes` those of the versions in `needs`, whose files it has too; `needed_by` are the finished
    versions that need it. `was_live` has the times that the log knows. An unfinished version has only its name, or also
    a `problem` where its manifest is not readable; `adds_nothing` if its merge found no new row and has ended.
    `rows_of` has the rows of each OUT, by its URL, that are in the version.
    """

    version: str
    live: bool
    finished: bool
    created: float = 0.0
    rows: int = 0
    alive: int | None = None
    key: dict[str, str] = field(default_factory=dict)
    recall: dict[str, dict[str, Recall]] = field(default_factory=dict)
    base: str = ""
    problem: str = ""
    template: str = ""
    sources: tuple[MergedOutput, ...] = ()
    bytes: int = 0
    shared_bytes: int = 0
    needs: tuple[str, ...] = ()
    needed_by: tuple[str, ...] = ()
    was_live: tuple[LivePeriod, ...] = ()
    adds_nothing: bool = False
    rows_of: dict[str, int] = field(default_factory=dict)


def versions(store: Store) -> list[VersionInfo]:
    """All versions of INDEX, the oldest first, unfinished ones last. CorruptError: an entry of the log is damaged."""
    folders, log = folders_of(store), publications(store)
    found: dict[str, Manifest | str] = {}
    for version in folders:
        try:
            found[version] = load_manifest(store, version)
        except CorruptError as error:
            found[version] = str(error) if is_finished(store, version) else ""
    live = _live_or_none(store)
    listed = [_info(store, version, found, version == live, log) for version in folders]
    return sorted(listed, key=lambda info: (not info.finished, info.created, info.version))


def _live_or_none(store: Store) -> str | None:
    """The live version, or None where CURRENT names none: the list of versions is how that is mended."""
    try:
        return live_version(store)
    except CorruptError:
        return None


def folders_of(store: Store) -> list[str]:
    """The names of all versions, finished or not."""
    return [name for name in store.list("") if is_version(name)]


def _info(
    store: Store, version: str, found: Mapping[str, Manifest | str], live: bool, log: Sequence[Publication]
) -> VersionInfo:
    manifest = found[version]
    if isinstance(manifest, str):
        nothing = not manifest and kept.adds_nothing(store, version)
        return VersionInfo(version, live, finished=False, problem=manifest, adds_nothing=nothing)
    removed = removed_if_known(store, manifest)
    finished = [each for each in found.values() if isinstance(each, Manifest)]
    own = sum(file["bytes"] for name, file in manifest.files.items() if name.startswith(f"{version}/"))
    return VersionInfo(
        version,
        live,
        finished=True,
        created=manifest.created,
        rows=manifest.rows,
        alive=None if removed is None else manifest.rows - len(removed),
        key=manifest.key,
        recall=manifest.recall,
        base=manifest.base,
        template=manifest.template,
        sources=manifest.sources,
        bytes=own,
        shared_bytes=manifest.size - own,
        needs=tuple(sorted(manifest.needs)),
        needed_by=tuple(other.version for other in finished if version in other.needs),
        was_live=live_periods(version, log),
        rows_of=manifest.rows_of,
    )


def live_periods(version: str, log: Sequence[Publication]) -> tuple[LivePeriod, ...]:
    """When a version was live, by the log."""
    moves = [entry for entry in log if entry.version != entry.replaces]
    ends = [entry.created for entry in moves[1:]]
    periods = zip_longest(moves, ends)  # the last one has no end
    return tuple(LivePeriod(entry.created, end) for entry, end in periods if entry.version == version)


def describe(listed: Sequence[VersionInfo], index: str = "INDEX") -> str:
    """Versions as lines for people, the live one starred, and how to go back to the one that was live before."""
    lines = [line for info in listed for line in _lines(info)]
    before = [(period.end, info.version) for info in listed if not info.live for period in info.was_live if period.end]
    if before:
        lines.append(f"to go back: clip-batch versions --index {quote(index)} --use {max(before)[1]}")
    return "\n".join(lines) or "no versions"


def _lines(info: VersionInfo) -> list[str]:
    start = f"{'*' if info.live else ' '} {info.version}"
    if not info.finished:
        nothing = "adds nothing, as the index had all of its rows: clip-batch gc deletes it"
        return [f"{start}  {info.problem or (nothing if info.adds_nothing else 'not finished')}"]
    removed = "removals not counted yet" if info.alive is None else f"{info.rows - info.alive:,} removed"
    indices = [f"{modality} {key}{show_recall(info.recall.get(modality, {}))}" for modality, key in info.key.items()]
    lines = ["; ".join([f"{start}  {show_time(info.created)}  {counted(info.rows, 'row')}, {removed}", *indices])]
    size = format_bytes(info.bytes)
    size += f", and {format_bytes(info.shared_bytes)} of {', '.join(info.needs)}" if info.needs else ""
    size += f"; needed by {', '.join(info.needed_by)}" if info.needed_by else ""
    lines.append(size + (f"; added to {info.base}" if info.base else ""))
    if info.rows_of:
        lines.append("of " + ", ".join(f"{output} ({counted(rows, 'row')})" for output, rows in info.rows_of.items()))
    if info.was_live:
        lines.append("live " + ", ".join(map(_period, info.was_live)))
    return [lines[0], *(f"    {line}" for line in lines[1:])]


def _period(period: LivePeriod) -> str:
    start = show_time(period.start)
    return f"{start} to {show_time(period.end)}" if period.end else f"since {start}"


def show_time(seconds: float) -> str:
    """A time in Unix seconds, for people."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def show_recall(measured: dict[str, Recall]) -> str:
    """The recall@10 of an index by kind of query, in brackets."""
    values = ", ".join(f"{recall['10']:.3f} for {kind} queries" for kind, recall in measured.items())
    return f" (recall@10 {values})" if values else ""


def use(store: Store, version: str) -> Manifest:
    """Make a finished version the live one: roll back, or forward again. Rows that were removed stay removed.

    First the size of each of its files is checked, and the rows that are removed from it are found. A CURRENT that
    names no version is replaced. ConfigError: there is no such finished version, or it lacks the column of a removal
    list. CorruptError: a file is missing or of another size. ConflictError: another version has become live meanwhile,
    or this one was deleted.
    """
    mend(store)
    before = live_version(store)
    manifest = _finished(store, version)
    if problem := broken(store, manifest.files):
        raise CorruptError(f"{problem}: use another version, or merge again")
    removed_ids(store, manifest, fetch_metadata(store, manifest))
    publish(store, version, before)
    return manifest


def broken(store: Store, files: Mapping[str, StoredFile]) -> str | None:
    """What is wrong with the first of some files that is missing or not of its recorded size; None if none is."""
    with ThreadPoolExecutor(16) as pool:
        problems = pool.map(lambda file: _problem(store, file[0], file[1]["bytes"]), files.items())
        return next(filter(None, problems), None)


def _finished(store: Store, version: str) -> Manifest:
    finished = [name for name in folders_of(store) if is_finished(store, name)]
    if version not in finished:
        known = ", ".join(finished) or "none: run clip-batch merge"
        raise ConfigError(f"{store.url} has no finished version {version!r}; there are {known}")
    return load_manifest(store, version)


def _problem(store: Store, name: str, size: int) -> str | None:
    try:
        bytes_there = store.size(name)
    except FileNotFoundError:
        return f"{store.display(name)} is missing"
    return None if bytes_there == size else f"{store.display(name)} has {bytes_there} bytes, not {size} as recorded"


def drop(store: Store, version: str, rebuild: bool = False) -> None:
    """Delete a version's folder. An unfinished version may be deleted too, if no merge is building it.

    If this is killed, another call completes it. `rebuild` also deletes the live version, which is to be built anew.
    ConfigError: there is no such version, it is live, or another version needs its files, which an unfinished one may.
    CorruptError: a manifest is not readable.
    """
    while True:
        state = read_state(store)
        if version not in state.dropping:
            folders = folders_of(store)
            if version not in folders:
                raise ConfigError(f"{store.url} has no version {version!r}; there are {', '.join(folders) or 'none'}")
            if state.version == version and not rebuild:
                raise ConfigError(f"{store.display(version)} is live: use another version first")
            if is_finished(store, version):
                _refuse_base(store, version, [other for other in folders if other != version])
        if delete(store, state, {version}):
            return


def delete(store: Store, state: State, doomed: Set[str]) -> bool:
    """Delete the folders of versions that nothing needs, as was found after `state` was read; False: look again.

    First the log says so, so that none of them becomes live any more; it is False if the log has grown since.
    """
    if not doomed <= set(state.dropping) and not (
        append(store, state, state.version, {*state.dropping, *doomed}) and state.logged
    ):
        return False
    for version in sorted(doomed):
        if version in read_state(store).dropping:  # unless another command has completed it, and a merge built it anew
            store.remove(VersionPaths(version).manifest)
            store.remove_folder(version)
            store.abort_uploads(version, lambda name: True)
    while doomed & set((state := read_state(store)).dropping):
        append(store, state, state.version, {*state.dropping} - doomed)
    return True


def _refuse_base(store: Store, version: str, others: list[str]) -> None:
    for other in others:
        where = store.display(other)
        if not is_finished(store, other):
            if kept.adds_nothing(store, other):
                continue
            raise ConfigError(f"{where} is not finished and may be based on {version}: finish it, or drop it first")
        if version in load_manifest(store, other).needs:
            raise ConfigError(f"{where} has index shards, or the template, of {version}: drop it first, or keep both")
