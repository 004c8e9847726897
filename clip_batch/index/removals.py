"""Tombstones: rows that were opted out, by the values of a metadata column. They outlive versions.

INDEX/tombstones/<digest>.json            {"column": "key", "values": [...]}: one `remove`, never changed
INDEX/<version>/tombstones/<digest>.npy   sorted int64 ids of that version which it removes: a cache

A list belongs to INDEX, so that neither a later merge nor a roll-back brings its rows back. Whoever
opens a version and finds no cache scans the metadata. Only what is in INDEX/tombstones counts: to
take a removal back, delete its file there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clip_batch.errors import ConfigError, CorruptError, InputError
from clip_batch.index.manifest import Manifest, current_version
from clip_batch.index.paths import REMOVALS, VersionPaths, parse_removal_list, removal_list
from clip_batch.storage.arrow import ipc_schema
from clip_batch.storage.npy import read_npy_header
from clip_batch.storage.retry import corrupt_unless_unavailable
from clip_batch.storage.store import Store

Ids = npt.NDArray[np.int64]
Shards = Iterable[tuple[str, int]]
"""The metadata files of a version: (local path, id of the first row)."""


@dataclass(frozen=True)
class Tombstones:
    """One removal list: the sorted unique `values`, as text, of a metadata column."""

    column: str
    values: tuple[str, ...]

    @property
    def digest(self) -> str:
        """16 hex digits over column and values: the same list twice is one file."""
        return hashlib.sha256(self.to_json()).hexdigest()[:16]

    def to_json(self) -> bytes:
        return json.dumps({"column": self.column, "values": self.values}).encode()


class RemovedRows(NamedTuple):
    """What a list removes from a version: sorted ids (n,), and those of its values that no row has."""

    ids: Ids
    missing: tuple[str, ...]


def make(column: str, values: Iterable[str]) -> Tombstones:
    """The list of these values, in any order, repeats allowed."""
    return Tombstones(column, tuple(sorted(set(values))))


def names(store: Store) -> list[str]:
    """The sorted digests of all lists of INDEX, by one listing."""
    return [digest for name in store.list(REMOVALS) if (digest := parse_removal_list(name))]


def load(store: Store, digest: str) -> Tombstones:
    """A list of INDEX; CorruptError where its file is not what its name says."""
    name = removal_list(digest)
    data = store.read(name)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads(data)
        tombstones = Tombstones(found["column"], tuple(found["values"]))
        if tombstones.digest == digest:
            return tombstones
    raise CorruptError(f"{store.display(name)} is not the list of its name: remove those rows again, then delete it")


def add(store: Store, column: str, values: Iterable[str]) -> str:
    """Record a list; its digest. From now on every version that is opened lacks its rows."""
    tombstones = make(column, values)
    store.create(removal_list(tombstones.digest), tombstones.to_json())
    return load(store, tombstones.digest).digest  # a lost answer of `create` tells nothing


def state(store: Store) -> str:
    """A short string that changes whenever a server must open INDEX anew: another version, or another list.

    Ask before opening: what changes meanwhile then shows as a change.
    """
    listed = hashlib.sha256(" ".join(names(store)).encode()).hexdigest()[:16]
    return f"{current_version(store)}-{listed}"


def read_schema(store: Store, name: str) -> pa.Schema:
    """The columns of a metadata file. CorruptError if it is not readable."""
    what = f"{store.display(name)} is not a readable Arrow file"
    with corrupt_unless_unavailable(what, "merge again", pa.ArrowInvalid), store.open(name) as file:
        return ipc_schema(file)


def check(tombstones: Tombstones, schema: pa.Schema) -> None:
    """ConfigError where metadata of this schema cannot be searched for the list's values."""
    _typed(tombstones, schema)


def resolve(lists: Sequence[Tombstones], shards: Shards) -> list[RemovedRows]:
    """What each list removes, by one pass over their columns: memory-mapped, some bytes a row in memory.

    ConfigError: a shard has no such column, or one of neither text nor whole numbers, or a value is
    no such number. CorruptError: a file is not readable.
    """
    ids: list[list[Ids]] = [[np.empty(0, dtype=np.int64)] for _ in lists]
    seen: list[set[str | int]] = [set() for _ in lists]
    for path, offset in shards:
        for column in sorted({one.column for one in lists}):
            which = [i for i, one in enumerate(lists) if one.column == column]
            with _open(path) as reader:
                wanted = [_typed(lists[i], reader.schema) for i in which]
                rows, values = _matches(reader, column, pa.concat_arrays(wanted))
            if not len(rows):
                continue
            for i, one in zip(which, wanted, strict=True):
                mine = pc.is_in(values, value_set=one)
                ids[i].append(rows[np.asarray(mine)] + offset)
                seen[i].update(values.filter(mine).unique().to_pylist())
    return [
        RemovedRows(
            np.sort(np.concatenate(found)),
            tuple(value for value in one.values if value not in there and _number(value) not in there),
        )
        for one, found, there in zip(lists, ids, seen, strict=True)
    ]


@contextlib.contextmanager
def _open(path: str) -> Iterator[Any]:
    try:
        with pa.memory_map(path) as source:
            yield pa.ipc.open_file(source)
    except (OSError, pa.ArrowInvalid) as error:
        raise CorruptError(f"{path} is not a readable Arrow file ({error}): merge again") from None


def _matches(reader: Any, column: str, wanted: pa.Array) -> tuple[Ids, pa.ChunkedArray]:
    """The rows (n,) of a shard whose column has one of the values, and those values."""
    place = reader.schema.get_field_index(column)
    batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    chunks = [batch.column(place) for batch in batches if batch.num_rows]
    if not chunks:
        return np.empty(0, dtype=np.int64), pa.chunked_array([], wanted.type)
    data = pa.chunked_array(chunks)
    # one call, since each makes a hash table of all the values
    if pa.types.is_dictionary(data.type):
        data = data.unify_dictionaries()
        of_entries = pc.is_in(data.chunk(0).dictionary, value_set=wanted)
        mask = pc.fill_null(pa.chunked_array([of_entries.take(chunk.indices) for chunk in data.chunks]), False)
    else:
        mask = pc.is_in(data, value_set=wanted)
    rows = np.flatnonzero(np.asarray(mask))
    return rows, data.filter(mask).cast(wanted.type)


def _typed(tombstones: Tombstones, schema: pa.Schema) -> pa.Array:
    """The values as the column has them."""
    column, by = tombstones.column, f"tombstones {tombstones.digest}"
    if (place := schema.get_field_index(column)) < 0:
        there = ", ".join(schema.names)
        raise ConfigError(f"no metadata column {column!r} to remove rows by ({by}): there are {there}")
    kind = schema.field(place).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.array(tombstones.values, kind)
    if not pa.types.is_integer(kind):
        raise ConfigError(f"metadata column {column!r} is {kind}: rows are removed by text or whole numbers ({by})")
    for value in tombstones.values:
        try:
            pa.scalar(int(value), kind)
        except (ValueError, OverflowError):
            wrong = f"{value!r} is no {kind}, which metadata column {column!r} has"
            raise ConfigError(f"{wrong}: mend that value ({by})") from None
    return pa.array([int(value) for value in tombstones.values], kind)


def _number(value: str) -> int | None:
    try:
        return int(value)
    except ValueError:
        return None


def removed(store: Store, manifest: Manifest, shards: Shards) -> Ids:
    """Sorted unique ids (n,) of a version that no answer may contain; errors as `resolve` and `load`.

    What was resolved before is read from the version's cache; `shards` is looked at for the rest only,
    which is then kept in the cache if INDEX can be written.
    """
    listed = names(store)
    known = _cached(store, manifest, listed)
    if lists := [load(store, digest) for digest in listed if digest not in known]:
        for one, found in zip(lists, resolve(lists, shards), strict=True):
            keep(store, manifest, one.digest, found.ids)
            known[one.digest] = found.ids
    return _union(known.values())


def removed_if_known(store: Store, manifest: Manifest) -> Ids | None:
    """As `removed`, where the cache has all of it; else None."""
    listed = names(store)
    known = _cached(store, manifest, listed)
    return _union(known.values()) if len(known) == len(listed) else None


def contains(removed: Ids, ids: Ids) -> npt.NDArray[np.bool_]:
    """Which of the ids (n,) are among the sorted removed ones; a search each, whatever their number."""
    found: npt.NDArray[np.bool_] = np.zeros(ids.shape, dtype=np.bool_)
    if len(removed):
        found = removed[np.minimum(np.searchsorted(removed, ids), len(removed) - 1)] == ids
    return found


def keep(store: Store, manifest: Manifest, digest: str, ids: Ids) -> None:
    """Write a list's ids to the version's cache, if INDEX can be written."""
    buffer = io.BytesIO()
    np.save(buffer, ids)
    with contextlib.suppress(OSError, NotImplementedError, InputError):
        store.replace(VersionPaths(manifest.version).removed_ids(digest), buffer.getvalue())


def _cached(store: Store, manifest: Manifest, digests: Sequence[str]) -> dict[str, Ids]:
    """The ids of those lists that the version's cache has, whole."""
    paths = VersionPaths(manifest.version)
    names = set(store.list(paths.removals))
    cached = [digest for digest in digests if f"{digest}.npy" in names]
    ids = {}
    for digest, data in zip(cached, store.read_all(map(paths.removed_ids, cached)), strict=True):
        with contextlib.suppress(ValueError):
            ids[digest] = _read_ids(data, manifest.rows)
    return ids


def _read_ids(data: bytes, rows: int) -> Ids:
    """Sorted ids of a cache file; ValueError where it is none of a version of so many rows."""
    header = read_npy_header(io.BytesIO(data))
    ids = np.frombuffer(data, dtype="<i8", offset=header.offset)
    if header.dtype != ids.dtype or header.shape != ids.shape or np.any(np.diff(ids) <= 0):
        raise ValueError("not sorted int64 ids")
    if len(ids) and (ids[0] < 0 or ids[-1] >= rows):
        raise ValueError("ids of another version")
    return ids.astype(np.int64)


def _union(ids: Iterable[Ids]) -> Ids:
    union: Ids = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *ids]))
    return union
