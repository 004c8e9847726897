"""gc --index: deletes versions that nothing needs any more, and what merges have left in the others.

Kept are the live version, those that were live before it, those that were live or written to lately, and whatever these
need. The log says which versions are being deleted before the first file goes (see `clip_batch.index.publications`), so
that none of them becomes live meanwhile; if this is killed, another call completes it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from clip_batch.errors import CorruptError
from clip_batch.index import kept, removals
from clip_batch.index.manifest import load_manifest
from clip_batch.index.paths import VersionPaths
from clip_batch.index.publications import Publication, is_finished, publications, read_state
from clip_batch.index.versions import delete, folders_of, live_periods
from clip_batch.storage.paths import TEMPORARY
from clip_batch.storage.store import Store
from clip_batch.types import counted, format_bytes

KEEP = 3
"""How many versions that were live before the live one are kept, unless the caller says otherwise."""

OLDER_THAN = 7.0
"""Days for which everything is kept, unless the caller says otherwise."""

DAY = 24 * 3600


@dataclass(frozen=True)
class Garbage:
    """A version, or what is left over in one (`name` is a path below INDEX); its bytes, and why nothing needs it."""

    name: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class GcReport:
    """What was deleted, or with `dry_run` would be; its `bytes` in all; and why each other version is `kept`."""

    removed: tuple[Garbage, ...]
    kept: dict[str, str]
    bytes: int
    dry_run: bool


def gc_index(store: Store, keep: int = KEEP, older_than: float = OLDER_THAN, dry_run: bool = False) -> GcReport:
    """Delete the versions of INDEX that nothing needs, and what is left over in the others.

    What a merge left that found no new row goes at any age.
    `keep` versions that were live before the live one are kept. What was live, or written to, within `older_than` days
    is kept too: a merge may be building it, or a service may have it open. ConfigError: there is no index.
    CorruptError: the manifest of a version that is kept, or an entry of the log, is not readable, so that nobody knows
    what is needed; nothing is deleted then.
    """
    since = time.time() - older_than * DAY
    while True:
        state, log = read_state(store), publications(store)
        versions = [version for version in folders_of(store) if version not in state.dropping]
        if not versions and not state.dropping:
            load_manifest(store)  # refuses a folder that is no index, such as a mistyped one
        reasons = {state.version: "live"} if state.version else {}
        reasons |= dict.fromkeys(_live_before(store, log, versions, keep, reasons), "was live before")
        reasons |= {version: reason for version in versions if (reason := _young(store, log, version, since))} | reasons
        reasons |= _needed(store, reasons) | reasons
        doomed = {version: _why(store, version, log) for version in versions if version not in reasons}
        doomed |= dict.fromkeys(state.dropping, "its deletion was not completed")
        removed = [
            Garbage(version, sum(store.files(version).values()), reason) for version, reason in sorted(doomed.items())
        ]
        left = [garbage for version in sorted(reasons) for garbage in _left_over(store, version, since)]
        if dry_run or delete(store, state, doomed.keys()):
            break
    for garbage in left if not dry_run else ():
        store.remove_folder(garbage.name)
        store.remove(garbage.name)
    size = sum(garbage.bytes for garbage in (*removed, *left))
    return GcReport((*removed, *left), dict(sorted(reasons.items())), size, dry_run)


def _live_before(
    store: Store, log: list[Publication], versions: list[str], keep: int, live: Iterable[str]
) -> list[str]:
    """The last `keep` finished versions that were live before the live one."""
    before = dict.fromkeys(entry.version for entry in reversed(log) if entry.version in versions)
    finished = [version for version in before if version and version not in live and is_finished(store, version)]
    return finished[:keep]


def _young(store: Store, log: list[Publication], version: str, since: float) -> str:
    """Why a version is too young to be deleted; "" where it is not."""
    if any(period.end is None or period.end >= since for period in live_periods(version, log)):
        return "was live lately"
    if is_finished(store, version):
        return "was built lately" if _changed(store, [VersionPaths(version).manifest], since) else ""
    if kept.adds_nothing(store, version):
        return ""
    names = [f"{version}/{name}" for name in store.files(version)]
    return "a merge may be building it" if _changed(store, names or [version], since) else ""


def _changed(store: Store, names: Iterable[str], since: float) -> bool:
    """Whether one of some files was written since then, or the store does not tell."""
    for name in names:
        try:
            changed = store.modified(name)
        except FileNotFoundError:  # another command deletes it
            continue
        if changed is None or changed >= since:
            return True
    return False


def _needed(store: Store, versions: Iterable[str]) -> dict[str, str]:
    """The versions that some versions need, and by which one."""
    needed, waiting = dict[str, str](), list(versions)
    for version in waiting:
        for other in sorted(_needs(store, version)):
            if other not in needed:
                needed[other] = f"{version} needs it"
                waiting.append(other)
    return needed


def _needs(store: Store, version: str) -> frozenset[str]:
    """The other versions that a version needs, or that a merge needs which is building it."""
    if is_finished(store, version):
        return load_manifest(store, version).needs
    try:
        record = kept.read_record(store, VersionPaths(version).template_record)
    except CorruptError:  # not trained yet: what it will be added to is live, or was so lately
        return frozenset()
    base = record.get("replaces") if record.get("reference") else ""
    return frozenset({base or "", str(record.get("template", "")).partition("/")[0]} - {"", version})


def _why(store: Store, version: str, log: list[Publication]) -> str:
    """Why a version that nothing needs is not kept."""
    if periods := live_periods(version, log):
        return f"was live until {time.strftime('%Y-%m-%d', time.localtime(periods[-1].end))}"
    if not is_finished(store, version) and kept.adds_nothing(store, version):
        return "its merge found no new row"
    return "never was live"


def _left_over(store: Store, version: str, since: float) -> Iterator[Garbage]:
    """What attempts that did not win, killed commands and deleted removal lists have left in a finished version."""
    if not is_finished(store, version):
        return
    paths, lists = VersionPaths(version), set(removals.histories(store))
    try:
        trained = paths.template(kept.read_record(store, paths.template_record)["attempt"]).folder
    except CorruptError:  # nobody knows which attempt counts; verify --index says so
        trained = paths.templates
    groups = dict[tuple[str, str], dict[str, int]]()
    for name, size in store.files(version).items():
        path, parts = f"{version}/{name}", name.split("/")
        if name.startswith("attempts/") and len(parts) > 2:
            group = "/".join(path.split("/")[:3]), "an attempt that did not win"
        elif name.startswith("template/") and len(parts) > 2 and not path.startswith(f"{trained}/"):
            group = "/".join(path.split("/")[:3]), "an attempt to train that did not win"
        elif TEMPORARY in parts[-1] and parts[-1].startswith("."):
            group = path, "a file that was not written to its end"
        elif path.startswith(f"{paths.removals}/") and parts[-1].removesuffix(".npy") not in lists:
            yield Garbage(path, size, "the rows of a removal list that is no longer there")
            continue
        else:
            continue
        groups.setdefault(group, {})[path] = size
    for (name, reason), files in groups.items():
        if not _changed(store, files, since):
            yield Garbage(name, sum(files.values()), reason)


def describe(report: GcReport) -> str:
    """A report as text for people."""
    verb = "would be deleted" if report.dry_run else "deleted"
    lines = [f"{garbage.name}: {garbage.reason}, {format_bytes(garbage.bytes)}" for garbage in report.removed]
    lines += [f"{version} is kept: {reason}" for version, reason in report.kept.items()]
    return "\n".join([*lines, f"{counted(len(report.removed), 'item')} {verb}, {format_bytes(report.bytes)}"])
