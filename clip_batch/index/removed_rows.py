"""Which rows of a version the removal lists remove: their values or names, looked up in the metadata files.

Each version caches the ids that a list removes from it; whoever opens a version without that cache scans its metadata.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clip_batch.errors import ConfigError, CorruptError, InputError
from clip_batch.index.manifest import Manifest
from clip_batch.index.paths import VersionPaths
from clip_batch.index.removal_pack import MANY, pack, unpack
from clip_batch.index.removals import Removal, RemovalList, RowList, RowName, load_all, names
from clip_batch.storage.arrow import UNREADABLE, ipc_schema
from clip_batch.storage.npy import read_npy_header
from clip_batch.storage.retry import corrupt_unless_unavailable
from clip_batch.storage.store import Store

Ids = npt.NDArray[np.int64]
Shards = Iterable[tuple[str, int]]
"""The metadata files of a version: (local path, id of the first row)."""


class RemovedRows(NamedTuple):
    """The sorted ids (n,) that a list removes from a version, and the values, or names, of the list that no row has."""

    ids: Ids
    missing: tuple[str, ...]


def read_schema(store: Store, name: str) -> pa.Schema:
    """The columns of a metadata file. CorruptError if it is not readable."""
    what = f"{store.display(name)} is not a readable Arrow file"
    with corrupt_unless_unavailable(what, "merge again", *UNREADABLE), store.open(name) as file:
        return ipc_schema(file)


def check_column(removals: Removal, schema: pa.Schema) -> None:
    """ConfigError where metadata of this schema cannot be searched for the list's values."""
    if isinstance(removals, RemovalList):
        _typed_values(removals, schema)


def removed_ids(store: Store, manifest: Manifest, shards: Shards) -> Ids:
    """The sorted unique ids (n,) of a version that no search may return. Errors: as `find_removed` and `load`.

    These are the rows of removal lists, and those that newer rows replaced (`replaced_ids`). The former are read from
    the version's cache; `shards` is scanned only for lists that the cache lacks, which are then added to it if INDEX
    can be written.
    """
    removed = removed_by(store, manifest, names(store), shards)
    return union([*removed.values(), replaced_ids(store, manifest)])


def removed_by(store: Store, manifest: Manifest, digests: Sequence[str], shards: Shards) -> dict[str, Ids]:
    """The ids that each of these lists removes from a version, counting or not; read and kept as `removed_ids` does."""
    ids = cached(store, manifest, digests)
    if lists := list(load_all(store, [digest for digest in digests if digest not in ids])):
        found = {removal.digest: rows.ids for removal, rows in zip(lists, find_removed(lists, shards), strict=True)}
        ids |= found
        if len(found) > MANY:
            _write(store, VersionPaths(manifest.version).packed_ids, pack(ids))
        else:
            for digest, of_list in found.items():
                cache(store, manifest, digest, of_list)
    return ids


def removed_if_known(store: Store, manifest: Manifest) -> Ids | None:
    """The ids that `removed_ids` returns if the version's cache has all of them; None otherwise."""
    digests = names(store)
    ids = cached(store, manifest, digests)
    return union([*ids.values(), replaced_ids(store, manifest)]) if len(ids) == len(digests) else None


def replaced_ids(store: Store, manifest: Manifest) -> Ids:
    """The sorted ids (n,) of a version that newer rows of the same source shards replaced (`merge --add --replace`).

    CorruptError: their file is damaged.
    """
    for name in manifest.replaced:
        what = f"{store.display(name)} is not the ids of replaced rows"
        with corrupt_unless_unavailable(what, "put it back from a copy, or merge anew", ValueError):
            return _read_ids(store.read(name), manifest.rows)
    return np.empty(0, dtype=np.int64)


def contains(removed: Ids, ids: Ids) -> npt.NDArray[np.bool_]:
    """Which of the ids (n,) are among the sorted removed ones, by a binary search for each."""
    contained: npt.NDArray[np.bool_] = np.zeros(ids.shape, dtype=np.bool_)
    if len(removed):
        contained = removed[np.minimum(np.searchsorted(removed, ids), len(removed) - 1)] == ids
    return contained


def cache(store: Store, manifest: Manifest, digest: str, ids: Ids) -> None:
    """Write the ids that a list removes from a version to the version's cache, if INDEX can be written."""
    buffer = io.BytesIO()
    np.save(buffer, ids)
    _write(store, VersionPaths(manifest.version).removed_ids(digest), buffer.getvalue())


def _write(store: Store, name: str, data: bytes) -> None:
    with contextlib.suppress(OSError, NotImplementedError, InputError):
        store.replace(name, data)


def fetch_metadata(store: Store, manifest: Manifest) -> Iterator[tuple[str, int]]:
    """The local metadata files of a version; a copy of a remote one is deleted when the next one is fetched."""
    for shard in manifest.shards:
        with store.fetch(manifest.paths(shard).metadata(shard.name)) as path:
            yield path, shard.offset


def find_removed(lists: Sequence[Removal], shards: Shards) -> list[RemovedRows]:
    """The rows that each list removes, by one pass over the shards' memory-mapped columns.

    A list of rows removes every row of the name, if several have one. ConfigError: a shard lacks the column of a list
    of values, or has one of neither text nor whole numbers, or a value is no such number. CorruptError: a file is not
    readable.
    """
    ids: list[list[Ids]] = [[np.empty(0, dtype=np.int64)] for _ in lists]
    seen: list[set[Any]] = [set() for _ in lists]
    by_column: dict[str, list[tuple[int, RemovalList]]] = {}
    named: dict[RowName, list[int]] = {}
    for place, removal in enumerate(lists):
        if isinstance(removal, RemovalList):
            by_column.setdefault(removal.column, []).append((place, removal))
        else:
            for name in removal.rows:
                named.setdefault(name, []).append(place)
    find_named = _finder(named)
    for path, offset in shards:
        with _open(path) as reader:
            for column, of_column in sorted(by_column.items()):
                values_of = [_typed_values(removal, reader.schema) for _, removal in of_column]
                rows, values = _matches(reader, column, pa.concat_arrays(values_of))
                for (place, _), own_values in zip(of_column, values_of, strict=True) if len(rows) else ():
                    mask = pc.is_in(values, value_set=own_values)
                    ids[place].append(rows[np.asarray(mask)] + offset)
                    seen[place].update(values.filter(mask).unique().to_pylist())
            found: dict[int, list[int]] = {}
            for row, name in find_named(reader) if named else ():
                for place in named[name]:
                    found.setdefault(place, []).append(row + offset)
                    seen[place].add(name)
            for place, in_file in found.items():
                ids[place].append(np.array(in_file, dtype=np.int64))
    return [
        RemovedRows(np.sort(np.concatenate(rows)), tuple(_missing(removal, values)))
        for removal, rows, values in zip(lists, ids, seen, strict=True)
    ]


def _missing(removal: Removal, seen: Collection[Any]) -> Iterator[str]:
    """The values, or names, of a list that are not among those seen."""
    if isinstance(removal, RowList):
        yield from (str(name) for name in removal.rows if name not in seen)
    else:
        yield from (value for value in removal.values if value not in seen and _number(value) not in seen)


@contextlib.contextmanager
def _open(path: str) -> Iterator[Any]:
    try:
        with pa.memory_map(path) as source:
            yield pa.ipc.open_file(source)
    except (OSError, pa.ArrowInvalid) as error:
        raise CorruptError(f"{path} is not a readable Arrow file ({error}): merge again") from None


def _matches(reader: Any, column: str, value_set: pa.Array) -> tuple[Ids, pa.ChunkedArray]:
    """The rows (n,) of a shard whose column has one of the values, and their values."""
    data = _column(reader, column)
    if not len(data):
        return np.empty(0, dtype=np.int64), pa.chunked_array([], value_set.type)
    mask = _is_in(data, value_set)
    rows = np.flatnonzero(np.asarray(mask))
    return rows, data.filter(mask).cast(value_set.type)


def _column(reader: Any, column: str) -> pa.ChunkedArray:
    """A column of a shard, with one dictionary if it has one; null where the shard lacks it."""
    place = reader.schema.get_field_index(column)
    batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    if place < 0:
        return pa.chunked_array([pa.nulls(batch.num_rows, pa.string()) for batch in batches], pa.string())
    data = pa.chunked_array(
        [batch.column(place) for batch in batches if batch.num_rows], reader.schema.field(place).type
    )
    return data.unify_dictionaries() if pa.types.is_dictionary(data.type) else data


def _is_in(data: pa.ChunkedArray, value_set: pa.Array) -> pa.ChunkedArray:
    """Whether each value is in a set without null. One call for all chunks: each makes a hash table of the set."""
    if not pa.types.is_dictionary(data.type) or not data.num_chunks:
        return pc.is_in(data, value_set=value_set)
    of_entries = pc.is_in(data.chunk(0).dictionary, value_set=value_set)
    return pc.fill_null(pa.chunked_array([of_entries.take(chunk.indices) for chunk in data.chunks]), False)


def _finder(named: Collection[RowName]) -> Callable[[Any], Iterator[tuple[int, RowName]]]:
    """A function from a shard's reader to its rows of these names. Rows are told by shard and key first, by columns."""
    keys, shards = {name.key for name in named}, {name.shard for name in named}

    def among(data: pa.ChunkedArray, values: set[str | None]) -> npt.NDArray[np.bool_]:
        kind: Any = data.type.value_type if pa.types.is_dictionary(data.type) else data.type
        mask = np.asarray(_is_in(data, pa.array(values - {None}, kind)))
        return mask | np.asarray(data.is_null()) if None in values else mask

    def find(reader: Any) -> Iterator[tuple[int, RowName]]:
        shard, key = _column(reader, "shard"), _column(reader, "key")
        rows = np.flatnonzero(among(shard, shards) & among(key, keys))
        if len(rows):
            columns = [column.take(pa.array(rows)) for column in (shard, _column(reader, "offset"), key)]
            for row, *name in zip(rows.tolist(), *(column.to_pylist() for column in columns), strict=True):
                if (row_name := RowName(*name)) in named:
                    yield row, row_name

    return find


def _typed_values(removals: RemovalList, schema: pa.Schema) -> pa.Array:
    """The values of a list in the type of their column."""
    column = removals.column
    if (place := schema.get_field_index(column)) < 0:
        by, columns = f"tombstones {removals.digest}", ", ".join(schema.names)
        raise ConfigError(f"no metadata column {column!r} to remove rows by ({by}): there are {columns}")
    kind = schema.field(place).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.array(removals.values, kind)
    by = f"tombstones {removals.digest}"
    if not pa.types.is_integer(kind):
        raise ConfigError(
            f"metadata column {column!r} is {kind}, and values are text or whole numbers: use where ({by})"
        )
    with contextlib.suppress(ValueError, OverflowError):
        return pa.array([int(value) for value in removals.values], kind)
    for value in removals.values:
        try:
            pa.scalar(int(value), kind)
        except (ValueError, OverflowError):
            wrong = f"{value!r} is no {kind}, which metadata column {column!r} has"
            raise ConfigError(f"{wrong}: correct that value ({by})") from None
    raise AssertionError("a value is wrong, but none by itself")


def _number(value: str) -> int | None:
    try:
        return int(value)
    except ValueError:
        return None


def cached(store: Store, manifest: Manifest, digests: Sequence[str]) -> dict[str, Ids]:
    """The ids of those lists that the version's cache has, by digest; damaged files are skipped.

    Many that have a file each are packed into one, if INDEX can be written, before they are returned.
    """
    paths = VersionPaths(manifest.version)
    files = {f"{paths.removals}/{name}" for name in store.list(paths.removals)} if digests else set()
    packed: dict[str, Ids] = {}
    if paths.packed_ids in files:
        with contextlib.suppress(ValueError, FileNotFoundError):
            packed = unpack(store.read(paths.packed_ids), manifest.rows)
    single = [digest for digest in digests if digest not in packed and paths.removed_ids(digest) in files]
    ids = {digest: packed[digest] for digest in digests if digest in packed}
    for digest, data in zip(single, store.read_all(map(paths.removed_ids, single)), strict=True):
        with contextlib.suppress(ValueError):
            ids[digest] = _read_ids(data, manifest.rows)
    if len(single) > MANY:
        _write(store, paths.packed_ids, pack(packed | ids))
    return ids


def _read_ids(data: bytes, rows: int) -> Ids:
    """The sorted ids of a cache file; ValueError if it is none, or not of a version of `rows` rows."""
    header = read_npy_header(io.BytesIO(data))
    ids = np.frombuffer(data, dtype="<i8", offset=header.offset)
    if header.dtype != ids.dtype or header.shape != ids.shape or np.any(np.diff(ids) <= 0):
        raise ValueError("not sorted int64 ids")
    if len(ids) and (ids[0] < 0 or ids[-1] >= rows):
        raise ValueError("ids of another version")
    return ids.astype(np.int64)


def union(ids: Iterable[Ids]) -> Ids:
    """The sorted unique ids of several lists."""
    merged: Ids = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *ids]))
    return merged[np.diff(merged, prepend=-1) > 0]  # np.unique takes ten times as long
