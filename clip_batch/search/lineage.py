"""Lineage: from a row of the index back to its embedding in OUT and its image in its tar.

A row's metadata holds `partition` and `row` (where its vectors are in OUT) and `shard`, `offset` and
`length` (where its image is). Which OUT it came from is the index shard's, in the manifest.
"""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_batch.config import StorageConfig
from clip_batch.embeddings.clip_retrieval import DTYPES
from clip_batch.embeddings.commits import read_commits
from clip_batch.errors import ConfigError, CorruptError, InputError
from clip_batch.index.manifest import IndexShard, Manifest, MergedOutput
from clip_batch.plan import paths
from clip_batch.plan.plan import count_partitions
from clip_batch.storage.npy import read_npy_header
from clip_batch.storage.retry import corrupt_unless_unavailable
from clip_batch.storage.store import Store
from clip_batch.storage.transfer import has_ranges, read_range
from clip_batch.types import partition_name

Vectors = npt.NDArray[np.float32]

_HEADER = 256
"""Bytes in which an npy header of a matrix ends: numpy pads it to 128."""


@dataclass(frozen=True)
class Lineage:
    """Where a row came from: vectors at `row` of `partition` of OUT `output`; image bytes in tar `shard`.

    `offset` and `length` are None where the image has no byte range (a compressed tar, or no tar).
    """

    output: str
    partition: int
    row: int
    shard: str
    offset: int | None
    length: int | None


def shard_of(manifest: Manifest, id: int) -> IndexShard:
    """The index shard that has the row `id`; ConfigError where the index has no such row."""
    if not 0 <= id < manifest.rows:
        raise ConfigError(f"no row {id} in index version {manifest.version}: ids are 0 to {manifest.rows - 1}")
    return manifest.shards[bisect_right(manifest.shards, id, key=lambda shard: shard.offset) - 1]


def is_planned(manifest: Manifest, id: int) -> bool:
    """Whether the shard and byte range of row `id` are what our planner recorded. ConfigError: there is no such row.

    Of other rows they are only what data says of itself (embeddings or an index that clip-retrieval made), and
    could name any file of this machine: never open those.
    """
    return _verified(manifest, shard_of(manifest, id))


def planned(manifest: Manifest) -> list[tuple[int, int]]:
    """The ids [start, stop) of all such rows, ascending."""
    runs: list[tuple[int, int]] = []
    for shard in manifest.shards:
        right = _verified(manifest, shard)
        if right and runs and runs[-1][1] == shard.offset:
            runs[-1] = runs[-1][0], shard.offset + shard.rows
        elif right:
            runs.append((shard.offset, shard.offset + shard.rows))
    return runs


def _verified(manifest: Manifest, shard: IndexShard) -> bool:
    return bool(manifest.sources) and manifest.sources[shard.source].verified


def where(manifest: Manifest, id: int, row: dict[str, Any]) -> Lineage:
    """The lineage of row `id`, whose metadata is `row`. ConfigError: no such row, or its OUT is not recorded."""
    output = _source(manifest, shard_of(manifest, id).source).output
    image = row["shard"], row["offset"], row["length"]
    return Lineage(output, row["partition"], row["row"], *image)


def _source(manifest: Manifest, source: int) -> MergedOutput:
    if source >= len(manifest.sources):
        raise ConfigError(f"index version {manifest.version} does not record its OUT: merge again")
    return manifest.sources[source]


def embedding(
    manifest: Manifest,
    row: dict[str, Any],
    source: int,
    storage: StorageConfig = StorageConfig(),
    kind: str = "image",
) -> Vectors:
    """The committed vector float32 (d,) of a row, as OUT has it (not scaled anew), by two small reads of its npy.

    `row` has `partition` and `row`, `source` is the position of its OUT in the manifest (that of
    `shard_of`), `kind` is image or text (all zero without a caption). ConfigError: OUT is not
    recorded, or no such kind. CorruptError: OUT no longer has what was merged.
    """
    origin = _source(manifest, source)
    store = Store(origin.output, storage.storage_options)
    if kind not in paths.VECTORS:
        raise ConfigError(f"no vectors of {kind!r}: kinds are {', '.join(paths.VECTORS)}")
    partition, place = int(row["partition"]), int(row["row"])
    find = _committed if origin.verified else _numbered
    path = find(store, origin, paths.VECTORS[kind], partition)
    with corrupt_unless_unavailable(f"{store.display(path)} has no row {place}", _MEND, ValueError, InputError):
        header = read_npy_header(io.BytesIO(_read(store, path, 0, min(_HEADER, store.size(path)))))
        if not header.is_matrix(DTYPES) or place >= header.shape[0] or header.shape[1] != manifest.dim:
            raise ValueError(f"it is {header}")
        width = header.dtype.itemsize * manifest.dim
        first = header.offset + place * width
        data = _read(store, path, first, first + width)
    return np.frombuffer(data, header.dtype).astype(np.float32)


_MEND = "run clip-batch verify, then repair, or merge again"


def _committed(store: Store, origin: MergedOutput, folder: str, partition: int) -> str:
    """The npy file that the partition's commit names."""
    name = partition_name(partition, count_partitions(store))
    try:
        commit = read_commits(store, [name])[partition]
    except FileNotFoundError:
        raise CorruptError(f"{store.url}: partition {partition} is no longer committed: {_MEND}") from None
    if commit.plan != origin.plan:
        raise CorruptError(f"{store.url} was planned anew since it was merged: merge again")
    if (path := commit.file(folder)) is None:
        raise CorruptError(f"{store.url}: the commit of partition {partition} names no {folder} file: {_MEND}")
    return path


def _numbered(store: Store, origin: MergedOutput, folder: str, partition: int) -> str:
    """The npy file of that number, in a folder without commits (see `clip_batch.embeddings.clip_retrieval`)."""
    pattern = rf"{folder}_0*{partition}(-[0-9a-f]{{8}})?\.npy"
    if len(found := [name for name in store.list(folder) if re.fullmatch(pattern, name)]) != 1:
        raise CorruptError(f"{store.display(folder)} has {len(found)} files of number {partition}: merge again")
    return f"{folder}/{found[0]}"


def image(row: dict[str, Any], storage: StorageConfig = StorageConfig()) -> bytes | None:
    """A row's image file, by the byte range in its tar; None where it has none, or the tar has not got it now.

    Only for rows that are `planned`: their `shard` is the planner's own URL (a side-car field of that name never
    gets there), so data cannot name a file of this machine.
    """
    if row.get("offset") is None or row.get("length") is None:
        return None
    folder, _, name = row["shard"].rpartition("/")
    store = Store(folder, storage.storage_options)
    try:
        return _read(store, name, row["offset"], row["offset"] + row["length"])
    except (OSError, InputError):
        return None


def _read(store: Store, name: str, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file, and no more where the store gives ranges. InputError if it ends earlier."""
    if not store.local and has_ranges(store.remote(name)):
        return read_range(store.remote(name), start, stop)
    with store.open(name) as file:
        file.seek(start)
        data = file.read(stop - start)
    if len(data) < stop - start:
        raise InputError(f"{store.display(name)} ends before byte {stop}")
    return data
