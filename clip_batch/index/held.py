"""What an index version holds: the slices of source shards whose rows it has, and the names of rows.

A row is named by its source shard and its place in it, whatever OUT it came through: the place of the shard (see
`Places`), the row's offset, and its key. Where several rows of a shard agree in these (a compressed tar may repeat a
key), the second of them is another row than the first. The content of a shard is its size and etag.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clip_batch.embeddings.metadata import LINEAGE
from clip_batch.embeddings.reader import Embeddings
from clip_batch.errors import CorruptError
from clip_batch.index.manifest import Manifest, MergedOutput
from clip_batch.index.metadata import MetadataFile
from clip_batch.index.paths import VersionPaths
from clip_batch.plan.state import newest
from clip_batch.storage.arrow import UNREADABLE, ParquetFile
from clip_batch.storage.names import name_text
from clip_batch.storage.paths import absolute, is_local
from clip_batch.storage.retry import corrupt_unless_unavailable
from clip_batch.storage.store import Store
from clip_batch.types import Commit, StoredFile

Ids = npt.NDArray[np.int64]
Names = npt.NDArray[np.uint64]
"""Names of rows (n, 2): 128 bits of each."""

SCHEMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}
"""Other names of the protocols of URLs."""

REMEDY = "put it back from a copy, or merge anew"

COLUMNS = {
    "shard": pa.string(),
    "offset": pa.int64(),
    "key": pa.string(),
    **dict.fromkeys(LINEAGE, pa.int32()),
}
"""The metadata columns that name a row."""


class Content(NamedTuple):
    """The size in bytes and the version of a source shard; None where it is not known, or is a folder's."""

    size: int | None = None
    etag: str | None = None

    def differs(self, other: Content) -> bool:
        """Whether both are known and are not the same. A folder of pictures only grows: its rows are told by key."""
        if self.size is None or other.size is None:
            return False
        return self.size != other.size or (None not in (self.etag, other.etag) and self.etag != other.etag)

    def __str__(self) -> str:
        return f"{self.size:,} bytes, version {self.etag}" if self.size is not None else "unknown content"


@dataclass(frozen=True, slots=True)
class HeldSlice:
    """A slice of a source shard of which an index has rows.

    `url`, `size`, `etag`, `start` and `stop` are the plan's, `rows` of it are in `partition`, and `commit` is the
    digest of that partition's commit. Of a folder without commits `url` is the folder's with "#" and the number of a
    part, and `etag` the tag of its files.
    """

    url: str
    size: int | None
    etag: str | None
    start: int
    stop: int | None
    rows: int
    partition: int
    commit: str

    @property
    def content(self) -> Content:
        """The content of the shard, as far as it tells."""
        return Content(self.size, self.etag)


class Places:
    """The one name of a place that URLs may spell in several ways: relative, below a linked folder, with `file://`.

    A linked folder is resolved, once for all the files in it; a link to a tar itself is not, which would cost a request
    to the disk for each.
    """

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}
        self._places: dict[str, str] = {}

    def of(self, url: str) -> str:
        """The name of the place of a URL or path."""
        if (place := self._places.get(url)) is None:
            place = self._places[url] = self._local(url) if is_local(url) else _remote(url)
        return place

    def _local(self, url: str) -> str:
        path = absolute(url)
        folder, name = os.path.split(path)
        if "." not in name:  # a folder, of which an input has few
            return os.path.realpath(path)
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        return os.path.join(self._folders[folder], name)


def _remote(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{SCHEMES.get(scheme.lower(), scheme.lower())}://{rest.rstrip('/')}"


def commit_digest(commit: Commit) -> str:
    """16 hex digits over the attempt and the contents of the files of a commit; a copy of OUT has the same."""
    content = [commit.partition, commit.attempt, sorted(str(file["sha256"]) for file in commit.files.values())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def slices_of(source: Embeddings) -> list[HeldSlice]:
    """The slices of source shards that the parts of an OUT have rows of."""
    partitions = {partition.id: partition for partition in source.plan.partitions}
    found = []
    for commit in source.commits:
        number, digest = commit.partition, commit_digest(commit)
        if not source.verified:
            tags = " ".join(sorted(str(file["sha256"]) for file in commit.files.values()))
            size = sum(file["bytes"] for file in commit.files.values())
            url = part_url(source.store.url, number)
            found.append(HeldSlice(url, size, tags, 0, None, commit.rows, number, digest))
            continue
        for piece in partitions[number].slices:
            shard, url = newest(piece.shard, commit.inputs), name_text(piece.shard.url)
            if rows := commit.shards.get(url, {}).get("embedded", 0):
                found.append(HeldSlice(url, shard.size, shard.etag, piece.start, piece.stop, rows, number, digest))
    return found


def embedded_again(source: Embeddings, slices: Iterable[HeldSlice]) -> list[int]:
    """The partitions of folders of pictures that an OUT has embedded again since an index got these slices of it.

    Their rows stand by their names, although a picture or a caption may be another one. Tars tell by their content.
    """
    now = {commit.partition: commit_digest(commit) for commit in (*source.commits, *source.empty) if commit.replaces}
    folders = (one for one in slices if one.size is None)
    return sorted({one.partition for one in folders if one.commit != now.get(one.partition, one.commit)})


def part_url(output: str, number: int) -> str:
    """What stands for the source shard of a part of a folder without commits."""
    return f"{output.rstrip('/')}#{number}"


def write(slices: Sequence[HeldSlice], file: IO[bytes]) -> None:
    """Write slices as a Parquet file, a row for each."""
    schema = pa.schema(
        {
            **{"url": pa.string(), "size": pa.int64(), "etag": pa.string(), "start": pa.int64(), "stop": pa.int64()},
            **{"rows": pa.int64(), "partition": pa.int32(), "commit": pa.string()},
        }
    )
    pq.write_table(pa.Table.from_pylist([asdict(one) for one in slices], schema), file, compression="zstd")


def read_sources(store: Store, manifest: Manifest) -> list[list[HeldSlice]]:
    """The slices that a version has of each of its sources. CorruptError: a file is damaged.

    Of a source that an older clip-batch merged, which left no file, these are the shards that its metadata names,
    without their content.
    """
    files = {number: file for number, source in enumerate(manifest.sources) for file in source.held.items()}
    contents = store.read_all(name for name, _ in files.values())
    slices = {number: _parsed(store, *files[number], data) for number, data in zip(files, contents, strict=True)}
    count = max(len(manifest.sources), 1)
    return [slices[number] if number in slices else _named_shards(store, manifest, number) for number in range(count)]


def read_source(store: Store, source: MergedOutput) -> list[HeldSlice]:
    """The slices that a version has of a source, which has a file `held`. CorruptError: it is damaged."""
    return [one for name, stored in source.held.items() for one in _parsed(store, name, stored, store.read(name))]


def _parsed(store: Store, name: str, stored: StoredFile, data: bytes) -> list[HeldSlice]:
    with corrupt_unless_unavailable(f"{store.display(name)} is not readable", REMEDY, *UNREADABLE):
        if hashlib.sha256(data).hexdigest() != stored["sha256"]:
            raise CorruptError(f"{store.display(name)} is not what was written (sha256 differs): {REMEDY}")
        return [HeldSlice(**row) for row in ParquetFile(io.BytesIO(data)).read().to_pylist()]


def _named_shards(store: Store, manifest: Manifest, number: int) -> list[HeldSlice]:
    rows: Counter[str] = Counter()
    for table, _ in named_rows(store, manifest, {number}):
        counts = table["shard"].cast(pa.string()).drop_null().value_counts()
        rows.update({pair["values"]: pair["counts"] for pair in counts.to_pylist()})
    return [HeldSlice(url, None, None, 0, None, count, 0, "") for url, count in rows.items()]


def named_rows(store: Store, manifest: Manifest, sources: set[int]) -> Iterator[tuple[pa.Table, Ids]]:
    """The columns `COLUMNS` of the rows of some sources of a version, in pieces, with the ids (n,) of the rows."""
    for shard in manifest.shards:
        if shard.source not in sources:
            continue
        source, start = origin(manifest, shard.source), shard.offset
        columns = COLUMNS if source is None or source.verified else {name: COLUMNS[name] for name in LINEAGE}
        with store.fetch(manifest.paths(shard).metadata(shard.name)) as path:
            for batch in MetadataFile(path).scan(pa.schema(columns)):
                yield with_shards(pa.Table.from_batches([batch]), source), np.arange(start, start + len(batch))
                start += len(batch)


def origin(manifest: Manifest, number: int) -> MergedOutput | None:
    """A source of a version, if the version records its sources."""
    return manifest.sources[number] if number < len(manifest.sources) else None


def with_shards(table: pa.Table, source: MergedOutput | Embeddings | None) -> pa.Table:
    """Metadata whose rows name their source shards, also where they are those of a folder without commits."""
    if source is None or source.verified:
        return table
    output = source.output if isinstance(source, MergedOutput) else source.store.url
    numbers = table["partition"].combine_chunks().dictionary_encode()
    urls = pa.array([part_url(output, number) for number in numbers.dictionary.to_pylist()], pa.string())
    columns = {"shard": urls.take(numbers.indices), "offset": table["row"].cast(pa.int64())}
    columns["key"] = pa.nulls(len(table), pa.string())
    return pa.table({**columns, **{name: table[name] for name in LINEAGE}})


def dropped_duplicates(store: Store, manifest: Manifest) -> Iterator[pa.Table]:
    """The columns `COLUMNS` of rows that `--dedup` left out of the shards of a version: the index knows them too."""
    for version in dict.fromkeys([*(shard.version or manifest.version for shard in manifest.shards), manifest.version]):
        built = manifest if version == manifest.version else _manifest(store, version)
        if built is None or not (name := built.duplicates.get("file")):
            continue
        with store.open(name) as file:
            report = ParquetFile(file)
            if "offset" in report.schema.names:  # an older report does not name its rows
                for table in report.pieces(65_536, list(COLUMNS)):
                    yield table.select(list(COLUMNS))


def _manifest(store: Store, version: str) -> Manifest | None:
    try:
        return Manifest.from_json(store.read(VersionPaths(version).manifest))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def select(table: pa.Table, places: Places, wanted: Mapping[str, int]) -> tuple[Ids, Ids]:
    """Which rows of a table are of some places, and the numbers that `wanted` gives these places: (n,), (n,)."""
    column = table["shard"].combine_chunks()
    column = column if isinstance(column, pa.DictionaryArray) else column.dictionary_encode()
    numbers = [-1 if url is None else wanted.get(places.of(url), -1) for url in column.dictionary.to_pylist()]
    codes = np.asarray(column.indices.fill_null(len(numbers)))
    of_rows = np.array([*numbers, -1], dtype=np.int64)[codes]
    rows = np.flatnonzero(of_rows >= 0)
    return rows, of_rows[rows]


def names_of(table: pa.Table, rows: Ids, places: Sequence[str]) -> Names:
    """The names (n, 2) of rows of a table, whose places are given, without regard to rows that are alike."""
    offsets, keys = (table[name].take(pa.array(rows)).to_pylist() for name in ("offset", "key"))
    texts: Iterable[str] = (f"{place}\0{at}\0{key}" for place, at, key in zip(places, offsets, keys, strict=True))
    digests = b"".join(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest() for text in texts)
    return np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)


def numbered(names: Names) -> Names:
    """The names of rows, where the second, third, ... of equal ones are told apart by their number."""
    order = np.lexsort((names[:, 1], names[:, 0]))
    ordered = names[order]
    new = np.ones(len(names), dtype=np.bool_)
    new[1:] = np.any(ordered[1:] != ordered[:-1], axis=1)
    positions = np.arange(len(names))
    firsts = np.maximum.accumulate(np.where(new, positions, 0)) if len(names) else positions
    told = names.copy()
    told[order, 1] += (positions - firsts).astype(np.uint64)
    return told


def are_in(names: Names, known: Names) -> npt.NDArray[np.bool_]:
    """Which names (n,) are among some known ones."""
    both = np.concatenate([known, names])
    order = np.lexsort((both[:, 1], both[:, 0]))  # stable: known ones before equal ones
    ordered = both[order]
    new = np.ones(len(both), dtype=np.bool_)
    new[1:] = np.any(ordered[1:] != ordered[:-1], axis=1)
    groups = np.cumsum(new) - 1
    first_known = (order < len(known))[np.flatnonzero(new)]
    result = np.empty(len(both), dtype=np.bool_)
    result[order] = first_known[groups]
    return result[len(known) :]
