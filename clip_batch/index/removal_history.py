"""Listing the removal lists of an index, and undoing them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_batch.config import StorageConfig
from clip_batch.config.paths import path_text
from clip_batch.errors import ClipBatchError, one_line
from clip_batch.index import removals, removed_rows
from clip_batch.index.manifest import load_manifest
from clip_batch.index.removals import RemovalEvent
from clip_batch.storage.store import Store
from clip_batch.types import StrPath, counted


@dataclass(frozen=True)
class RemovalInfo:
    """A removal list of INDEX: its digest, how its rows were chosen, and whether it counts (`active`).

    `column` and `values` (how many) are of a list of values; otherwise `about` says which query or condition found the
    rows, and `values` is how many. `rows` of the live version are removed by it, whatever others remove; None where
    that is not known. `created` is the Unix time of its first removal, None where the store does not tell; `history`
    has that event and each one since. `problem` says what is wrong with its file.
    """

    digest: str
    active: bool
    created: float | None
    note: str
    column: str
    values: int
    about: dict[str, Any]
    rows: int | None
    history: tuple[RemovalEvent, ...]
    problem: str = ""


@dataclass(frozen=True)
class UndoReport:
    """The list that no longer counts, by its `digest`: `rows` of the live `version` are found again.

    `still_removed` are those of its rows that other lists remove. Both are None where the live version cannot be
    searched for the list, or for another one.
    """

    digest: str
    version: str
    rows: int | None
    still_removed: int | None


def undo(index: StrPath, digest: str, storage: StorageConfig = StorageConfig(), note: str = "") -> UndoReport:
    """Let the list `digest` no longer count, in any version; to remove the same values or rows again undoes that.

    ConfigError: there is no such list, or it was undone already.
    """
    store = Store(path_text(index, "index"), storage.storage_options)
    manifest = load_manifest(store)
    removals.undo(store, digest, note)
    try:
        others = removed_rows.removed_ids(store, manifest, removed_rows.fetch_metadata(store, manifest))
        ids = removed_rows.removed_by(store, manifest, [digest], removed_rows.fetch_metadata(store, manifest))[digest]
    except (ClipBatchError, OSError):  # undoing is the remedy for a list that a version cannot be searched for
        return UndoReport(digest, manifest.version, None, None)
    still = int(np.count_nonzero(removed_rows.contains(others, ids)))
    return UndoReport(digest, manifest.version, len(ids) - still, still)


def list_removals(index: StrPath, storage: StorageConfig = StorageConfig()) -> list[RemovalInfo]:
    """Every removal list of INDEX, the oldest first, those that were undone too. ConfigError: there is no index."""
    store = Store(path_text(index, "index"), storage.storage_options)
    manifest = load_manifest(store)
    lists = removals.histories(store)
    events = removals.load_events(store, lists)
    ids = removed_rows.cached(store, manifest, list(lists))
    with contextlib.suppress(ClipBatchError, OSError):
        uncounted = [digest for digest in lists if digest not in ids and not removals.is_undone(lists[digest])]
        ids |= removed_rows.removed_by(store, manifest, uncounted, removed_rows.fetch_metadata(store, manifest))
    infos = [_info(store, digest, events[digest], ids.get(digest)) for digest in lists]
    return sorted(infos, key=lambda info: (info.created or 0, info.digest))


def _info(store: Store, digest: str, events: list[RemovalEvent], ids: removed_rows.Ids | None) -> RemovalInfo:
    about, problem = events[0].about, ""
    if not about:  # of an older clip-batch
        try:
            about = removals.describe(removals.load(store, digest))
        except (ClipBatchError, OSError) as error:
            problem = one_line(error)
    values = int(about.get("values", about.get("rows", 0)))
    rows, active = None if ids is None else len(ids), not events[-1].undone
    first, column = events[0], str(about.get("column", ""))
    return RemovalInfo(digest, active, first.time, first.note, column, values, about, rows, tuple(events), problem)


def describe_undo(report: UndoReport) -> str:
    """What undoing a list brought back, in a line for people."""
    if report.rows is None or report.still_removed is None:
        return f"removal {report.digest} no longer counts"
    text = f"{counted(report.rows, 'row')} of the live version can be found again"
    other = f"; {counted(report.still_removed, 'row')} of it removed by other lists too"
    return text + (other if report.still_removed else "")


def describe_list(infos: Sequence[RemovalInfo]) -> str:
    """Removal lists, for people: a line for each event of each."""
    return "\n".join(line for info in infos for line in _list_lines(info)) or "nothing was removed"


def _list_lines(info: RemovalInfo) -> Iterator[str]:
    rows = "rows not counted" if info.rows is None else f"{counted(info.rows, 'row')} of the live version"
    by = f"{counted(info.values, 'value')} of {info.column}" if info.column else _describe_about(info.about)
    state = [] if info.active else ["does not count"]
    yield "; ".join(
        [f"{info.digest}  {_when(info.created)}  {by}", rows, *state, *filter(None, [info.note, info.problem])]
    )
    for event in info.history[1:]:
        note = f"; {event.note}" if event.note else ""
        yield f"{' ' * 18}{_when(event.time)}  {'undone' if event.undone else 'removed again'}{note}"


def _describe_about(about: Mapping[str, Any]) -> str:
    """How rows that are named were chosen."""
    query = about.get("query") or {}
    example = next((f"{name} {query[name]}"[:100] for name in ("image", "text", "id", "sha256") if name in query), "")
    terms = [f"{example} at {query['threshold']} or more"] if example else ["several examples"] if query else []
    where = about.get("where") or query.get("where")
    chosen = " and ".join([*terms, *([f"where {where}"] if where else [])])
    return f"{counted(int(about.get('rows', 0)), 'row')} by {chosen or 'name'}"


def _when(seconds: float | None) -> str:
    return "at an unknown time" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
