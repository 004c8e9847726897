"""Which rows of a version the removal lists remove: their values, looked up in columns of the metadata files.

Each version caches the ids that a list removes from it; whoever opens a version without that cache scans its metadata.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clip_batch.errors import ConfigError, CorruptError, InputError
from clip_batch.index.manifest import Manifest
from clip_batch.index.paths import VersionPaths
from clip_batch.index.removals import RemovalList, load, names
from clip_batch.storage.arrow import UNREADABLE, ipc_schema
from clip_batch.storage.npy import read_npy_header
from clip_batch.storage.retry import corrupt_unless_unavailable
from clip_batch.storage.store import Store

Ids = npt.NDArray[np.int64]
Shards = Iterable[tuple[str, int]]
"""The metadata files of a version: (local path, id of the first row)."""


class RemovedRows(NamedTuple):
    """The sorted ids (n,) that a list removes from a version, and the values of the list that no row has."""

    ids: Ids
    missing: tuple[str, ...]


def read_schema(store: Store, name: str) -> pa.Schema:
    """The columns of a metadata file. CorruptError if it is not readable."""
    what = f"{store.display(name)} is not a readable Arrow file"
    with corrupt_unless_unavailable(what, "merge again", *UNREADABLE), store.open(name) as file:
        return ipc_schema(file)


def check_column(removals: RemovalList, schema: pa.Schema) -> None:
    """ConfigError where metadata of this schema cannot be searched for the list's values."""
    _typed_values(removals, schema)


def removed_ids(store: Store, manifest: Manifest, shards: Shards) -> Ids:
    """The sorted unique ids (n,) of a version that no search may return. Errors: as `find_removed` and `load`.

    They are read from the version's cache; `shards` is scanned only for lists that the cache lacks, which are then
    added to it if INDEX can be written.
    """
    digests = names(store)
    ids = _cached(store, manifest, digests)
    if lists := [load(store, digest) for digest in digests if digest not in ids]:
        for removals, rows in zip(lists, find_removed(lists, shards), strict=True):
            cache(store, manifest, removals.digest, rows.ids)
            ids[removals.digest] = rows.ids
    return _union(ids.values())


def removed_if_known(store: Store, manifest: Manifest) -> Ids | None:
    """The ids that `removed_ids` returns if the version's cache has all of them; None otherwise."""
    digests = names(store)
    ids = _cached(store, manifest, digests)
    return _union(ids.values()) if len(ids) == len(digests) else None


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
    with contextlib.suppress(OSError, NotImplementedError, InputError):
        store.replace(VersionPaths(manifest.version).removed_ids(digest), buffer.getvalue())


def fetch_metadata(store: Store, manifest: Manifest) -> Iterator[tuple[str, int]]:
    """The local metadata files of a version; a copy of a remote one is deleted when the next one is fetched."""
    for shard in manifest.shards:
        with store.fetch(manifest.paths(shard).metadata(shard.name)) as path:
            yield path, shard.offset


def find_removed(lists: Sequence[RemovalList], shards: Shards) -> list[RemovedRows]:
    """The rows that each list removes, by one pass over the shards' memory-mapped columns.

    ConfigError: a shard has no such column, or one of neither text nor whole numbers, or a value of the list is no
    such number. CorruptError: a file is not readable.
    """
    ids: list[list[Ids]] = [[np.empty(0, dtype=np.int64)] for _ in lists]
    seen: list[set[str | int]] = [set() for _ in lists]
    for path, offset in shards:
        for column in sorted({removals.column for removals in lists}):
            places = [place for place, removals in enumerate(lists) if removals.column == column]
            with _open(path) as reader:
                values_of = [_typed_values(lists[place], reader.schema) for place in places]
                rows, values = _matches(reader, column, pa.concat_arrays(values_of))
            if not len(rows):
                continue
            for place, own_values in zip(places, values_of, strict=True):
                mask = pc.is_in(values, value_set=own_values)
                ids[place].append(rows[np.asarray(mask)] + offset)
                seen[place].update(values.filter(mask).unique().to_pylist())
    return [
        RemovedRows(
            np.sort(np.concatenate(rows)),
            tuple(value for value in removals.values if value not in values and _number(value) not in values),
        )
        for removals, rows, values in zip(lists, ids, seen, strict=True)
    ]


@contextlib.contextmanager
def _open(path: str) -> Iterator[Any]:
    try:
        with pa.memory_map(path) as source:
            yield pa.ipc.open_file(source)
    except (OSError, pa.ArrowInvalid) as error:
        raise CorruptError(f"{path} is not a readable Arrow file ({error}): merge again") from None


def _matches(reader: Any, column: str, value_set: pa.Array) -> tuple[Ids, pa.ChunkedArray]:
    """The rows (n,) of a shard whose column has one of the values, and their values."""
    place = reader.schema.get_field_index(column)
    batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    chunks = [batch.column(place) for batch in batches if batch.num_rows]
    if not chunks:
        return np.empty(0, dtype=np.int64), pa.chunked_array([], value_set.type)
    data = pa.chunked_array(chunks)
    # One call for all chunks: each call makes a hash table of all the values.
    if pa.types.is_dictionary(data.type):
        data = data.unify_dictionaries()
        of_entries = pc.is_in(data.chunk(0).dictionary, value_set=value_set)
        mask = pc.fill_null(pa.chunked_array([of_entries.take(chunk.indices) for chunk in data.chunks]), False)
    else:
        mask = pc.is_in(data, value_set=value_set)
    rows = np.flatnonzero(np.asarray(mask))
    return rows, data.filter(mask).cast(value_set.type)


def _typed_values(removals: RemovalList, schema: pa.Schema) -> pa.Array:
    """The values of a list in the type of their column."""
    column, by = removals.column, f"tombstones {removals.digest}"
    if (place := schema.get_field_index(column)) < 0:
        columns = ", ".join(schema.names)
        raise ConfigError(f"no metadata column {column!r} to remove rows by ({by}): there are {columns}")
    kind = schema.field(place).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.array(removals.values, kind)
    if not pa.types.is_integer(kind):
        raise ConfigError(f"metadata column {column!r} is {kind}: rows are removed by text or whole numbers ({by})")
    for value in removals.values:
        try:
            pa.scalar(int(value), kind)
        except (ValueError, OverflowError):
            wrong = f"{value!r} is no {kind}, which metadata column {column!r} has"
            raise ConfigError(f"{wrong}: correct that value ({by})") from None
    return pa.array([int(value) for value in removals.values], kind)


def _number(value: str) -> int | None:
    try:
        return int(value)
    except ValueError:
        return None


def _cached(store: Store, manifest: Manifest, digests: Sequence[str]) -> dict[str, Ids]:
    """The ids of those lists that the version's cache has, by digest; damaged files are skipped."""
    paths = VersionPaths(manifest.version)
    files = set(store.list(paths.removals))
    cached = [digest for digest in digests if f"{digest}.npy" in files]
    ids = {}
    for digest, data in zip(cached, store.read_all(map(paths.removed_ids, cached)), strict=True):
        with contextlib.suppress(ValueError):
            ids[digest] = _read_ids(data, manifest.rows)
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


def _union(ids: Iterable[Ids]) -> Ids:
    union: Ids = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *ids]))
    return union
