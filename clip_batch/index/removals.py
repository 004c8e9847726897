"""Removal lists of INDEX: rows that no search may return, by the values of a metadata column, or named one by one.

A list belongs to INDEX, not to a version, so that neither a later merge nor a roll-back brings its rows back; on disk
the folder of the lists is `tombstones`. A list is never changed or deleted. Its history is a series of numbered files,
each created only if absent: number 0 says when it was removed, an odd number that it was undone, an even one that it
was removed again. A list counts unless its last event has an odd number, so one listing says which lists count.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import reprlib
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

from clip_batch.errors import ConfigError, CorruptError
from clip_batch.index.paths import REMOVALS, parse_removal_event, parse_removal_list, removal_event, removal_list
from clip_batch.storage.store import Store

_REMEDY = "remove those rows again, then delete it"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class RemovalList:
    """The sorted unique `values`, as text, of a metadata column: rows with one of them are removed."""

    column: str
    values: tuple[str, ...]

    @classmethod
    def of(cls, column: str, values: Iterable[str]) -> RemovalList:
        """The list of these values, in any order, repeats allowed."""
        return cls(column, tuple(sorted(set(values))))

    @cached_property
    def digest(self) -> str:
        """16 hex digits over column and values, so that equal lists are one file."""
        return _digest(self.to_json())

    def to_json(self) -> bytes:
        """The content of the list's file."""
        return json.dumps({"column": self.column, "values": self.values}).encode()


class RowName(NamedTuple):
    """What names a row in every version: its shard, its offset in it (None in a compressed tar), and its key."""

    shard: str | None
    offset: int | None
    key: str | None

    @property
    def order(self) -> tuple[str, int, str, bool, bool]:
        """A key to sort names by, which None has too."""
        shard, offset, key = self
        return shard or "", -1 if offset is None else offset, key or "", shard is None, key is None

    def __str__(self) -> str:
        return f"{self.key} in {self.shard or 'no shard'}"


@dataclass(frozen=True)
class RowList:
    """The sorted unique names of rows that are removed: what an example or a condition found at one time."""

    rows: tuple[RowName, ...]

    @classmethod
    def of(cls, rows: Iterable[RowName]) -> RowList:
        """The list of these rows, in any order, repeats allowed."""
        return cls(tuple(sorted(set(rows), key=lambda name: name.order)))

    @cached_property
    def digest(self) -> str:
        """16 hex digits over the rows, so that equal lists are one file."""
        return _digest(self.to_json())

    def to_json(self) -> bytes:
        """The content of the list's file: offsets and keys by shard."""
        shards = groupby(self.rows, key=lambda name: name.shard)
        return json.dumps({"rows": [(url, [(row.offset, row.key) for row in rows]) for url, rows in shards]}).encode()


Removal: TypeAlias = RemovalList | RowList


@dataclass(frozen=True)
class RemovalEvent:
    """One event of a list's history: it was removed, or `undone`, at a time in Unix seconds.

    `time` is None where it is not known. `about` says how the rows were chosen: "column" and "values" (how many), or
    "query" or "where", the "version" that was asked, and "rows" (how many).
    """

    undone: bool
    time: float | None = None
    note: str = ""
    about: dict[str, Any] = field(default_factory=dict)


def histories(store: Store) -> dict[str, list[int]]:
    """The sorted numbers of the events of every list of INDEX, by digest, in its order; from one listing."""
    files = store.list(REMOVALS)
    found: dict[str, list[int]] = {digest: [] for name in files if (digest := parse_removal_list(name))}
    for name in files:
        if (event := parse_removal_event(name)) and event[0] in found:
            found[event[0]].append(event[1])
    return {digest: sorted(numbers) for digest, numbers in found.items()}


def is_undone(events: list[int]) -> bool:
    """Whether a list with these events does not count."""
    return bool(events) and events[-1] % 2 == 1


def names(store: Store) -> list[str]:
    """The sorted digests of the lists of INDEX that count, by one listing."""
    return [digest for digest, events in histories(store).items() if not is_undone(events)]


def load(store: Store, digest: str) -> Removal:
    """A list of INDEX by its digest; CorruptError if the file has another content."""
    return next(load_all(store, [digest]))


def load_all(store: Store, digests: Sequence[str]) -> Iterator[Removal]:
    """Lists of INDEX by their digests, in order; several are read at once. Errors: as `load`."""
    for digest, data in zip(digests, store.read_all(map(removal_list, digests)), strict=True):
        removal = None
        with contextlib.suppress(ValueError, KeyError, TypeError):
            removal = _parse(json.loads(data))
        if removal is None or removal.digest != digest:
            raise CorruptError(f"{store.display(removal_list(digest))} is not the list of its name: {_REMEDY}")
        yield removal


def _parse(content: Mapping[str, Any]) -> Removal:
    if "rows" in content:
        return RowList(tuple(RowName(shard, *row) for shard, rows in content["rows"] for row in rows))
    return RemovalList(content["column"], tuple(content["values"]))


def describe(removal: Removal) -> dict[str, Any]:
    """The `about` of an event for a list: its column and how many values, or how many rows it names."""
    if isinstance(removal, RowList):
        return {"rows": len(removal.rows)}
    return {"column": removal.column, "values": len(removal.values)}


def load_events(store: Store, lists: Mapping[str, list[int]]) -> dict[str, list[RemovalEvent]]:
    """The events of lists, given by their numbers, in order, the first of which is the removal.

    Older lists have no file about that: its time is that of the list's own file, and its `about` is empty.
    """
    events: dict[str, list[RemovalEvent]] = {
        digest: [] if 0 in numbers else [RemovalEvent(False, store.modified(removal_list(digest)))]
        for digest, numbers in lists.items()
    }
    files = [(digest, number) for digest, numbers in lists.items() for number in numbers]
    for (digest, number), data in zip(files, store.read_all(removal_event(*file) for file in files), strict=True):
        record: dict[str, Any] = {}
        with contextlib.suppress(ValueError, TypeError):
            record = dict(json.loads(data))
        about = record.get("about")
        about = about if isinstance(about, dict) else {}
        events[digest].append(RemovalEvent(number % 2 == 1, record.get("time"), str(record.get("note", "")), about))
    return events


def add(store: Store, column: str, values: Iterable[str]) -> str:
    """Record a list of values of a column, as `record`."""
    return record(store, RemovalList.of(column, values))


def record(store: Store, removal: Removal, note: str = "", about: Mapping[str, Any] | None = None) -> str:
    """Record a list and return its digest. Every version that is opened from now on lacks its rows.

    A list that counts already stays as it is, one that was undone counts again.
    """
    _check_note(note)
    name = removal_list(removal.digest)
    created = store.create(name, removal.to_json())
    digest = load(store, removal.digest).digest  # `create` may have failed without an answer
    events = histories(store)[digest]
    if not events or is_undone(events):
        number = events[-1] + 1 if events else 0
        when = time.time() if created or events else store.modified(name)
        _create_event(store, digest, number, RemovalEvent(False, when, note, {**describe(removal), **(about or {})}))
    return digest


def undo(store: Store, digest: str, note: str = "") -> None:
    """Let a list no longer count, in any version. ConfigError: there is no such list, or it is undone already."""
    _check_note(note)
    lists = histories(store)
    if digest not in lists:
        raise ConfigError(f"{store.url} has no removal {digest!r}: clip-batch remove --list names those that there are")
    events = lists[digest]
    number = events[-1] + 1 if events else 1
    if is_undone(events) or not _create_event(store, digest, number, RemovalEvent(True, time.time(), note)):
        raise ConfigError(f"removal {digest} is undone already: its rows are removed only if another list has them")


def _check_note(note: object) -> None:
    if not isinstance(note, str):
        raise ConfigError(f"note is {reprlib.repr(note)}: it must be a text")


def _create_event(store: Store, digest: str, number: int, event: RemovalEvent) -> bool:
    """Record an event; False where another call was first."""
    name, mine = removal_event(digest, number), secrets.token_hex(8)
    content = {"id": mine, "undone": event.undone, "time": event.time, "note": event.note, "about": event.about}
    store.create(name, json.dumps(content).encode())
    return bool(store.read_json(name)["id"] == mine)  # `create` may have failed without an answer
