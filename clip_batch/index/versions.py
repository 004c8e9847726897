"""The versions of an index: list them, make another one live, delete old ones.

A version is a folder of 12 hex digits; it is finished once it has a manifest, and live while CURRENT names it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from clip_batch.errors import ConfigError, CorruptError
from clip_batch.index.ann.recall import Recall
from clip_batch.index.manifest import Manifest, load_manifest
from clip_batch.index.paths import VersionPaths, is_version
from clip_batch.index.publications import append, live_version, mend, publish, read_state
from clip_batch.index.removed_rows import fetch_metadata, removed_ids, removed_if_known
from clip_batch.storage.store import Store
from clip_batch.types import StoredFile, counted


@dataclass(frozen=True)
class VersionInfo:
    """One version. `created`, `rows`, `key`, `recall` and `base` are the manifest's.

    `alive` counts the rows that are not removed; None where that is not known without a scan. An unfinished version
    has only its name, or also a `problem` where its manifest is not readable.
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


def versions(store: Store) -> list[VersionInfo]:
    """All versions of INDEX, the oldest first, unfinished ones last."""
    live = live_version(store)
    listed = [_info(store, version, version == live) for version in _folders(store)]
    return sorted(listed, key=lambda info: (not info.finished, info.created, info.version))


def _folders(store: Store) -> list[str]:
    return [name for name in store.list("") if is_version(name)]


def _info(store: Store, version: str, live: bool) -> VersionInfo:
    try:
        manifest = load_manifest(store, version)
    except CorruptError as error:
        has_manifest = store.exists(VersionPaths(version).manifest)
        return VersionInfo(version, live, finished=False, problem=str(error) if has_manifest else "")
    removed = removed_if_known(store, manifest)
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
    )


def describe(listed: Sequence[VersionInfo]) -> str:
    """Versions as lines for people; the live one is starred."""
    return "\n".join(map(_line, listed)) or "no versions"


def _line(info: VersionInfo) -> str:
    start = f"{'*' if info.live else ' '} {info.version}"
    if not info.finished:
        return f"{start}  {info.problem or 'not finished'}"
    removed = "removals not counted yet" if info.alive is None else f"{info.rows - info.alive:,} removed"
    indices = [f"{modality} {key}{_recall(info.recall.get(modality, {}))}" for modality, key in info.key.items()]
    base = [f"added to {info.base}"] if info.base else []
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.created))
    return "; ".join([f"{start}  {when}  {counted(info.rows, 'row')}, {removed}", *indices, *base])


def _recall(measured: dict[str, Recall]) -> str:
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
    finished = [name for name in _folders(store) if store.exists(VersionPaths(name).manifest)]
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

    First the log says so, so that it cannot become live; if this is killed, another call completes it. `rebuild` also
    deletes the live version, which is to be built anew. ConfigError: there is no such version, it is live, or another
    version needs its files, which an unfinished one may. CorruptError: a manifest is not readable.
    """
    while version not in (state := read_state(store)).dropping:
        folders = _folders(store)
        if version not in folders:
            raise ConfigError(f"{store.url} has no version {version!r}; there are {', '.join(folders) or 'none'}")
        if state.version == version and not rebuild:
            raise ConfigError(f"{store.display(version)} is live: use another version first")
        if store.exists(VersionPaths(version).manifest):
            _refuse_base(store, version, [other for other in folders if other != version])
        append(store, state, state.version, {*state.dropping, version})
    store.remove(VersionPaths(version).manifest)
    store.remove_folder(version)
    while version in (state := read_state(store)).dropping:
        append(store, state, state.version, {*state.dropping} - {version})


def _refuse_base(store: Store, version: str, others: list[str]) -> None:
    for other in others:
        where = store.display(other)
        if not store.exists(VersionPaths(other).manifest):
            raise ConfigError(f"{where} is not finished and may be based on {version}: finish it, or drop it first")
        manifest = load_manifest(store, other)
        if version in {manifest.template, *(name.split("/")[0] for name in manifest.files)}:
            raise ConfigError(f"{where} has index shards, or the template, of {version}: drop it first, or keep both")
