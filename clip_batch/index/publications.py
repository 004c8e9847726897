"""Which version of INDEX is live, and how another one becomes so: the log of publications, and CURRENT.

    publications/00000001.json, 00000002.json, ...   the log: {"version", "replaces", "created", "dropping"}
    CURRENT                                          the version of the log's last entry, for every reader

An entry is created only if its number is free, and a writer takes the number after the last one that it has read. That
is the comparison: of two writers that began from the same entry one finds the number taken, and looks again. CURRENT is
written after the entry, and the log is read again after that, until both agree; whoever finds CURRENT behind the log
writes it again. The last entry is the whole state: the live version, and the versions that are being deleted, which can
not become live. An INDEX that older releases wrote has no log: CURRENT alone counts until the first entry.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from shlex import quote

from clip_batch.errors import ConflictError, CorruptError, InputError
from clip_batch.index.paths import CURRENT, PUBLICATIONS, VersionPaths, is_version, parse_publication, publication
from clip_batch.storage.store import Store

TRIES = 10
"""How often a merge with `add` begins again because another version has gone live meanwhile."""


@dataclass(frozen=True)
class Publication:
    """An entry of the log: `version` was live from `created` (Unix seconds) on, instead of `replaces` (None: nothing).

    `dropping` are the versions that were being deleted then. An entry whose `version` is also what it `replaces` only
    changes these.
    """

    number: int
    version: str | None
    replaces: str | None
    created: float
    dropping: tuple[str, ...] = ()


@dataclass(frozen=True)
class State:
    """The live `version` (None: nothing), the versions that are being deleted, and the `number` of the last entry.

    `logged` is False where the log has not the live version: an older release, or a person, wrote CURRENT.
    """

    version: str | None
    dropping: tuple[str, ...] = ()
    number: int = 0
    logged: bool = True


def current_version(store: Store) -> str | None:
    """The version that CURRENT names; None where there is no CURRENT. CorruptError: it does not name one.

    That is one request, for who asks every few seconds. `live_version` also knows of an entry that CURRENT lacks.
    """
    try:
        data = store.read(CURRENT)
    except FileNotFoundError:
        return None
    name = data[:100].decode(errors="replace").strip()
    if not is_version(name):
        raise CorruptError(
            f"{store.display(CURRENT)} has {name!r}, which is not the name of a version (12 hex digits): "
            f"clip-batch versions --index {quote(store.url)} lists them, with --use VERSION one is made live again"
        )
    return name


def is_finished(store: Store, version: str) -> bool:
    """Whether a version is finished, which it is once it has a manifest."""
    return store.exists(VersionPaths(version).manifest)


def live_version(store: Store) -> str | None:
    """The live version, None where there is none. Errors: as `read_state`."""
    return read_state(store).version


def publications(store: Store) -> list[Publication]:
    """The log, the oldest entry first. CorruptError: an entry is not readable."""
    return [_read(store, number) for number in _numbers(store)]


def read_state(store: Store, mending: bool = True) -> State:
    """The live version and what is being deleted. CURRENT is written again where it is behind and can be written.

    Without `mending` it is left as it is. CorruptError: CURRENT names no version, or an entry of the log is not
    readable.
    """
    current = current_version(store)
    if not (numbers := _numbers(store)):
        return State(current, logged=current is None)
    last = _read(store, numbers[-1])
    if current not in (None, last.version) and all(entry.version != current for entry in publications(store)):
        return State(current, last.dropping, last.number, logged=False)
    if current != last.version and mending:
        with contextlib.suppress(OSError, NotImplementedError, InputError):  # nor do readers need it
            _point(store, last)
    return State(last.version, last.dropping, last.number)


def publish(store: Store, version: str, onto: str | None) -> None:
    """Make a finished version live, provided that `onto` (None: nothing) is live; nothing to do if it is already.

    ConflictError: another version is live, or this one is being deleted, or is no longer there.
    """
    while True:
        state = read_state(store)  # before the look for the manifest, so that nobody deletes it from there on
        if state.version == version and state.logged:
            return
        if state.version not in (version, onto):
            raise ConflictError(
                f"{store.url} serves version {state.version or 'none'} now, not {onto or 'none'} as when this began: "
                "run the command again, which begins from it"
            )
        if version in state.dropping:
            raise being_deleted(store, version)
        if not is_finished(store, version):
            raise ConflictError(
                f"{store.display(version)} was deleted meanwhile: clip-batch versions lists what is there"
            )
        if append(store, state, version, state.dropping) and state.logged:
            return


def being_deleted(store: Store, version: str) -> ConflictError:
    """The error of whoever wants a version that is being deleted."""
    command = f"clip-batch versions --index {quote(store.url)} --drop {version}"
    return ConflictError(f"{store.display(version)} is being deleted: {command} completes that, if nothing is at it")


def append(store: Store, state: State, version: str | None, dropping: Iterable[str]) -> bool:
    """Append an entry to the log as it was when `state` was read, and write CURRENT; False if the log has grown since.

    Where the log has not the live version, the entry is about that one, and the caller looks again.
    """
    replaces = state.version
    if not state.logged:
        version, dropping = state.version, state.dropping
        replaces = _read(store, state.number).version if state.number else None
    entry = Publication(state.number + 1, version, replaces, time.time(), tuple(sorted(set(dropping))))
    data = {name: value for name, value in asdict(entry).items() if name != "number"}
    # What was created counts, not what `create` returned: the store's answer may have been lost.
    if not store.create(publication(entry.number), json.dumps(data).encode()) and _read(store, entry.number) != entry:
        return False
    if version is not None:
        _point(store, entry)
    return True


def mend(store: Store) -> None:
    """Replace a CURRENT that names no version by what the log says; without a log, delete it."""
    with contextlib.suppress(CorruptError):
        current_version(store)
        return
    if numbers := _numbers(store):
        _point(store, _read(store, numbers[-1]))
    else:
        store.remove(CURRENT)


def problems(store: Store) -> dict[str, str]:
    """What is wrong with CURRENT and the log, by their names, with the remedy; CURRENT is not mended."""
    found = dict[str, str]()
    try:
        log = publications(store)
        for before, entry in pairwise([None, *log]):
            assert entry is not None
            number, version = (before.number, before.version) if before else (0, None)
            if (entry.number, entry.replaces) != (number + 1, version):
                found["log of publications"] = (
                    f"entry {entry.number} does not follow entry {number}: what is live is not in doubt, but put what "
                    "is missing back from a copy"
                )
        current = current_version(store)
    except CorruptError as error:
        return {"what is live": str(error)}
    if log and current != log[-1].version:
        if current is None or any(entry.version == current for entry in log):
            found[CURRENT] = (
                f"is behind the log, whose last entry is version {log[-1].version}: whatever opens the index writes it "
                f"again, such as clip-batch versions --index {quote(store.url)}"
            )
        else:
            found[CURRENT] = (
                f"names version {current}, which the log lacks, as an older clip-batch or a person wrote it: "
                f"clip-batch versions --index {quote(store.url)} --use {current} enters it"
            )
    return found


def _point(store: Store, entry: Publication) -> None:
    """Write CURRENT, until it is what the log's last entry says."""
    while True:
        store.replace(CURRENT, f"{entry.version}\n".encode())
        last = _read(store, _numbers(store)[-1])
        if last.version == entry.version:
            return
        entry = last


def _numbers(store: Store) -> list[int]:
    return sorted(number for name in store.list(PUBLICATIONS) if (number := parse_publication(name)))


def _read(store: Store, number: int) -> Publication:
    name = publication(number)
    try:
        data = json.loads(store.read(name))
        entry = Publication(
            number, data["version"], data["replaces"], float(data["created"]), tuple(data.get("dropping", ()))
        )
        if all(is_version(each) for each in (entry.version, entry.replaces, *entry.dropping) if each is not None):
            return entry
        reason = "it has a name that is no version's"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise CorruptError(
        f"{store.display(name)} is not an entry of the log of publications ({reason}): put it back from a copy, or "
        f"delete it, and make a version live by clip-batch versions --index {quote(store.url)} --use VERSION"
    )
