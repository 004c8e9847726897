"""Frozen listings of folders: what a plan saw in a folder of files, so that a worker needs no listing of its own.

A listing is a Parquet file with a row for each sample, in order: its key, and the names, sizes and versions of its
files. It is named by its sha256, and so is the version (`etag`) of the Shard that it stands for: two names of one
listing are the same, and a folder that grew has a further listing, of what is new alone.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from clip_batch.errors import CorruptError
from clip_batch.storage.names import name_text, text_name
from clip_batch.storage.store import Store
from clip_batch.types import Shard

if TYPE_CHECKING:
    import pyarrow as pa

Listing = list[tuple[str, dict[str, str]]]
"""Each sample's key, and its files' names by their lower-case extension; sorted by key."""

Version = tuple[int | None, str | None]
"""The size of a file in bytes, and its etag or (locally) the time of its last change; None where they are not known."""

_PREFIX = "listing-"
"""How the version of a folder with a frozen listing begins; without one it is a digest of names."""

_ROWS = 16_384
"""Rows of a row group."""


class ListedSample(NamedTuple):
    """A sample as its folder was listed: its key, and the size and version of each of its files by name."""

    key: str
    files: dict[str, Version]


def is_frozen(shard: Shard) -> bool:
    """Whether a shard is a folder with a frozen listing."""
    return (shard.etag or "").startswith(_PREFIX)


def file_name(etag: str) -> str:
    """The base name of the file of a listing, given the version of its shard."""
    return f"{etag.removeprefix(_PREFIX)}.parquet"


def freeze(samples: Iterable[ListedSample]) -> tuple[str, bytes]:
    """The version of a folder that has these samples, and the file of its listing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = list(samples)
    schema = pa.schema(
        {
            "key": pa.string(),
            "names": pa.list_(pa.string()),
            "sizes": pa.list_(pa.int64()),
            "versions": pa.list_(pa.string()),
        }
    )
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        for start in range(0, max(len(rows), 1), _ROWS):
            piece = rows[start : start + _ROWS]
            columns = {
                "key": [name_text(row.key) for row in piece],
                "names": [[name_text(name) for name in row.files] for row in piece],
                "sizes": [[size for size, _ in row.files.values()] for row in piece],
                "versions": [[version for _, version in row.files.values()] for row in piece],
            }
            writer.write_table(pa.table(columns, schema))
    data = buffer.getvalue()
    return f"{_PREFIX}{hashlib.sha256(data).hexdigest()[:32]}", data


def listed(samples: Listing, versions: Mapping[str, Version]) -> Iterator[ListedSample]:
    """Samples with the sizes and versions of their files."""
    return (ListedSample(key, {name: versions[name] for name in files.values()}) for key, files in samples)


def read(folder: str, etag: str, options: dict[str, Any] | None, start: int = 0, stop: int | None = None) -> Listing:
    """The samples [start, stop) of a listing in a folder of listings, as `list_samples` gives them."""
    return [(sample.key, _by_extension(sample.files)) for sample in read_all(folder, etag, options, start, stop)]


def read_all(
    folder: str, etag: str, options: dict[str, Any] | None, start: int = 0, stop: int | None = None
) -> Iterator[ListedSample]:
    """The samples [start, stop) of a listing, with the versions of their files."""
    return _rows(_table(folder, etag, options), start, stop)


def _by_extension(names: Iterable[str]) -> dict[str, str]:
    return {name.rpartition(".")[2].lower(): name for name in names}


def _rows(table: pa.Table, start: int, stop: int | None) -> Iterator[ListedSample]:
    stop = len(table) if stop is None else min(stop, len(table))
    for low in range(start, stop, _ROWS):  # some at a time: Python's objects take ten times the memory
        columns = table.slice(low, min(_ROWS, stop - low)).columns
        for key, names, sizes, versions in zip(*(column.to_pylist() for column in columns), strict=True):
            files = zip(map(text_name, names), zip(sizes, versions, strict=True), strict=True)
            yield ListedSample(text_name(key), dict(files))


_last: tuple[object, Any] | None = None
"""The listing that was read last, and what it is of: a worker's partitions are of one folder after another."""


def _table(folder: str, etag: str, options: dict[str, Any] | None) -> pa.Table:
    """The whole listing. CorruptError: its file is gone, or is not the one that was frozen."""
    global _last
    what = folder, etag, repr(options)
    if (last := _last) and last[0] == what:
        return last[1]
    from clip_batch.storage.arrow import ParquetFile

    store = Store(folder, options)
    try:
        data = store.read(file_name(etag))
    except FileNotFoundError:
        data = b""
    if not etag.endswith(hashlib.sha256(data).hexdigest()[:32]):
        where = store.display(file_name(etag))
        raise CorruptError(f"{where} is not the listing that was planned: restore it, or plan into another output")
    table = ParquetFile(io.BytesIO(data)).read()
    _last = what, table
    return table


def image_of(names: Iterable[str], extensions: Collection[str]) -> str | None:
    """The image among the files of a sample, of which a folder's has one at most; None if it has none."""
    return next((name for name in names if name.rpartition(".")[2].lower() in extensions), None)
