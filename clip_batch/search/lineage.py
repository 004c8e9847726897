"""Trace a row of the index back to its embedding in OUT and to its image in a tar.

A row's metadata says where its vectors are in OUT (`partition` and `row`) and where its image is: `shard`, `offset` and
`length` in a tar, or `shard`, `offset` (the number of the row) and `image_column` in a Parquet file. The manifest says,
for each index shard, from which OUT its rows came.
"""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from collections.abc import Mapping
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
from clip_batch.plan.stored import read_generations
from clip_batch.samples.files import read_picture
from clip_batch.samples.parquet.reader import read_image
from clip_batch.samples.tar.suffixes import is_compressed, is_tar
from clip_batch.storage.arrow import UNREADABLE
from clip_batch.storage.names import text_name
from clip_batch.storage.npy import read_npy_header
from clip_batch.storage.paths import split_url
from clip_batch.storage.retry import corrupt_unless_unavailable
from clip_batch.storage.store import Store
from clip_batch.storage.transfer import has_ranges, read_range
from clip_batch.types import IMAGE_COLUMN, ROW_GROUP, generation_of, partition_name

Vectors = npt.NDArray[np.float32]

_HEADER = 256
"""Bytes that surely hold the npy header of a matrix, which numpy pads to 128."""


@dataclass(frozen=True)
class Lineage:
    """Where a row came from: its vectors are at `row` of `partition` in OUT `output`, its image is in the tar `shard`.

    `offset` and `length` are None if the image has no byte range, as in a compressed tar, or in a folder. If it is in a
    Parquet file, `offset` is its row there, in the row group `row_group`, and `length` is None.
    """

    output: str
    partition: int
    row: int
    shard: str
    offset: int | None
    length: int | None
    row_group: int | None = None


def shard_of(manifest: Manifest, id: int) -> IndexShard:
    """Return the index shard that has the row `id`. ConfigError: the index has no such row."""
    if not 0 <= id < manifest.rows:
        raise ConfigError(f"no row {id} in index version {manifest.version}: ids are 0 to {manifest.rows - 1}")
    return manifest.shards[bisect_right(manifest.shards, id, key=lambda shard: shard.offset) - 1]


def is_planned(manifest: Manifest, id: int) -> bool:
    """Return whether our planner recorded the tar and byte range of row `id`. ConfigError: the index has no such row.

    Those of other rows come from foreign data (embeddings or an index that clip-retrieval made), and could name any
    file of this machine: never open them.
    """
    return _verified(manifest, shard_of(manifest, id))


def planned(manifest: Manifest) -> list[tuple[int, int]]:
    """Return the ranges [start, stop) of the ids whose tars and byte ranges our planner recorded, ascending."""
    runs: list[tuple[int, int]] = []
    for shard in manifest.shards:
        verified = _verified(manifest, shard)
        if verified and runs and runs[-1][1] == shard.offset:
            runs[-1] = runs[-1][0], shard.offset + shard.rows
        elif verified:
            runs.append((shard.offset, shard.offset + shard.rows))
    return runs


def _verified(manifest: Manifest, shard: IndexShard) -> bool:
    return bool(manifest.sources) and manifest.sources[shard.source].verified


def where(manifest: Manifest, id: int, row: dict[str, Any]) -> Lineage:
    """Return the lineage of row `id`, whose metadata is `row`. ConfigError: no such row, or OUT is not recorded."""
    output = _source(manifest, shard_of(manifest, id).source).output
    image = row["shard"], row["offset"], row["length"], row.get(ROW_GROUP)
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
    """Read the committed vector float32 (d,) of a row from OUT, unscaled, with two small reads of its npy file.

    `row` has `partition` and `row`. `source` is the position of its OUT in the manifest, which `shard_of` gives. `kind`
    is image or text; the text vector of a row without a caption is all zero. ConfigError: OUT is not recorded, or has
    no such kind. CorruptError: OUT no longer has what was merged.
    """
    origin = _source(manifest, source)
    store = Store(origin.output, storage.storage_options)
    if kind not in paths.VECTORS:
        raise ConfigError(f"no vectors of {kind!r}: kinds are {', '.join(paths.VECTORS)}")
    partition, position = int(row["partition"]), int(row["row"])
    locate = _committed if origin.verified else _numbered
    path = locate(store, origin, paths.VECTORS[kind], partition, manifest.created)
    with corrupt_unless_unavailable(f"{store.display(path)} has no row {position}", _REMEDY, ValueError, InputError):
        header = read_npy_header(io.BytesIO(_read(store, path, 0, min(_HEADER, store.size(path)))))
        if not header.is_matrix(DTYPES) or position >= header.shape[0] or header.shape[1] != manifest.dim:
            raise ValueError(f"it is {header}")
        width = header.dtype.itemsize * manifest.dim
        first = header.offset + position * width
        data = _read(store, path, first, first + width)
    return np.frombuffer(data, header.dtype).astype(np.float32)


_REMEDY = "run clip-batch verify, then repair, or merge again"


def _committed(store: Store, origin: MergedOutput, folder: str, partition: int, merged: float) -> str:
    """Return the path of the npy file that the partition's commit names. CorruptError: there is none any longer.

    `merged` is when its rows were merged: a commit that has replaced another since has other rows.
    """
    generations = read_generations(store)
    generation = generation_of(generations, partition)
    name = partition_name(partition, generation.stop)
    try:
        commit = read_commits(store, [name])[partition]
    except FileNotFoundError:
        raise CorruptError(f"{store.url}: partition {partition} is no longer committed: {_REMEDY}") from None
    if commit.plan != generation.digest or origin.plan not in (one.digest for one in generations):
        raise CorruptError(f"{store.url} was planned anew since it was merged: merge again")
    if commit.replaces and commit.finished > merged:
        raise CorruptError(f"{store.url}: partition {partition} was embedded again since it was merged: merge again")
    if (path := commit.file(folder)) is None:
        raise CorruptError(f"{store.url}: the commit of partition {partition} names no {folder} file: {_REMEDY}")
    return path


def _numbered(store: Store, origin: MergedOutput, folder: str, partition: int, merged: float) -> str:
    """Return the path of a partition's npy file in a folder without commits, by the number in its name.

    See `clip_batch.embeddings.clip_retrieval`. CorruptError: there is not exactly one such file.
    """
    pattern = rf"{folder}_0*{partition}(-[0-9a-f]{{8}})?\.npy"
    if len(names := [name for name in store.list(folder) if re.fullmatch(pattern, name)]) != 1:
        raise CorruptError(f"{store.display(folder)} has {len(names)} files of number {partition}: merge again")
    return f"{folder}/{names[0]}"


COLUMNS = ("shard", "key", "offset", "length", IMAGE_COLUMN)
"""The metadata columns that locate a row's image; an index without Parquet files has not the last one."""


def has_place(row: dict[str, Any]) -> bool:
    """Return whether a row's metadata locates its image, in a tar, in a Parquet file or in a folder."""
    if in_folder(row):
        return True
    return None not in (row.get("shard"), row.get("offset"), row.get("length" if _in_tar(row) else IMAGE_COLUMN))


def shows(manifest: Manifest, id: int, row: dict[str, Any], storage: StorageConfig) -> bool:
    """Return whether row `id`, whose metadata is `row`, has an image that may be read.

    Rows of a folder may have none, as there are folders of texts: where the index has no images, it looks.
    """
    if not (has_place(row) and is_planned(manifest, id)):
        return False
    images = any(name.startswith("image/") for name in shard_of(manifest, id).files)
    return images or not in_folder(row) or image(row, storage) is not None


def _in_tar(row: dict[str, Any]) -> bool:
    """Return whether a row's image, if it has a place, is a range of bytes; in a Parquet file it has no length."""
    return row.get("length") is not None


def in_folder(row: Mapping[str, Any]) -> bool:
    """Return whether a row's image is a file of a folder, of which the key is the name; its shard is no file then."""
    placed = row.get("offset") is not None or row.get("length") is not None
    if placed or None in (row.get("shard"), row.get("key")):
        return False
    return not (is_tar(row["shard"]) or is_compressed(row["shard"]))


def image(row: dict[str, Any], storage: StorageConfig = StorageConfig()) -> bytes | None:
    """Read a row's image by its place in a tar, a Parquet file or a folder; None if it has none, or is not readable.

    Call it only for rows that are `planned`: their `shard` is a URL that our planner recorded, which data cannot
    choose, as a side-car field of that name is never stored there.
    """
    if not has_place(row):
        return None
    if in_folder(row):
        try:
            return read_picture(Store(text_name(row["shard"]), storage.storage_options), text_name(row["key"]))
        except (OSError, InputError):
            return None
    folder, name = split_url(text_name(row["shard"]))
    store = Store(folder, storage.storage_options)
    try:
        if not _in_tar(row):
            with store.open(name) as file:
                return read_image(file, row["offset"], row[IMAGE_COLUMN])
        return _read(store, name, row["offset"], row["offset"] + row["length"])
    except (OSError, InputError, *UNREADABLE):
        return None


def _read(store: Store, name: str, start: int, stop: int) -> bytes:
    """Read the bytes [start, stop) of a file, by a ranged read if the store has those. InputError: it ends earlier."""
    if not store.local and has_ranges(store.remote(name)):
        return read_range(store.remote(name), start, stop)
    with store.open(name) as file:
        file.seek(start)
        data = file.read(stop - start)
    if len(data) < stop - start:
        raise InputError(f"{store.display(name)} ends before byte {stop}")
    return data
