"""URL lists of any kind, frozen as Parquet files that img2dataset reads just as they are.

    DIR/urls/00000.parquet   url, caption, refused and the columns that are kept, in the order of the list
    DIR/urls.json            written last: how many URLs, from which files, by which options

Frozen, so that the n-th URL is the same one whenever a download goes on, and is known by the key that
img2dataset gives it. `url` is null where the list has no http(s) URL; `refused` is what it has there.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clip_batch.config import DownloadConfig
from clip_batch.errors import ConfigError, InputError
from clip_batch.launch.end2end.formats import READERS, _format, _read, _unreadable
from clip_batch.storage.arrow import ParquetFile
from clip_batch.storage.paths import absolute
from clip_batch.storage.store import Store

FROZEN = "urls.json"
FOLDER = "urls"
IMAGES = "images"

FILE = 1_000_000
"""URLs of a frozen file, rounded up to whole shards: img2dataset begins a shard with each file."""


CHANGES = ("url_column", "caption_column", "save_columns", "image_size", "resize_mode", "img2dataset_options")
"""Options that what is downloaded depends on; a download that goes on must have the same."""

KEYS_OF_IMG2DATASET = frozenset(
    {"key", "caption", "url", "width", "height", "original_width", "original_height", "status", "error_message"}
    | {"exif", "md5", "sha256", "sha512", "refused"}
)
"""Columns that it, or we, write; no column of the list can be kept under these names."""


@dataclass(frozen=True)
class UrlList:
    """A frozen list: shard s has its URLs [s * shard_samples, (s + 1) * shard_samples)."""

    urls: int
    shard_samples: int
    captions: bool
    files: list[list[Any]]
    options: dict[str, Any]

    @property
    def shards(self) -> int:
        return math.ceil(self.urls / self.shard_samples)

    @property
    def rows_of_file(self) -> int:
        """URLs of each frozen file but the last."""
        return math.ceil(FILE / self.shard_samples) * self.shard_samples

    @property
    def _scale(self) -> int:
        return int(10 ** math.ceil(math.log10(self.shard_samples)))

    def rows(self, keys: pa.Array | pa.ChunkedArray) -> Any:
        """Numbers (n,) int64 in the list of the samples with these keys, which img2dataset made of shard and place."""
        numbers = pc.cast(keys, pa.int64()).to_numpy()
        return numbers // self._scale * self.shard_samples + numbers % self._scale


def freeze(config: DownloadConfig, home: Store, options: dict[str, Any]) -> UrlList:
    """The list frozen in DIR, or the one that stands there if nothing differs.

    Until a shard is downloaded, another one takes its place. ConfigError: an option is wrong, or another list has
    shards there. InputError: the list cannot be read.
    """
    _check(config)
    store, names = _files(config.urls, options)
    files = [[store.display(name), store.size(name), store.modified(name)] for name in names]
    settings = {name: getattr(config, name) for name in CHANGES}
    if home.exists(FROZEN) and any(name.endswith("_stats.json") for name in home.list(IMAGES)):
        standing = UrlList(**home.read_json(FROZEN))
        new = {**settings, "files": files, "shard_samples": config.shard_samples}
        old = {**standing.options, "files": standing.files, "shard_samples": standing.shard_samples}
        if different := [name for name in new if new[name] != old[name]]:
            raise ConfigError(
                f"{home.url} holds another download: {', '.join(different)} differ; give another --output"
            )
        return standing
    schema = _schema(config, store, names)
    home.remove(FROZEN)
    home.remove_folder(FOLDER)
    draft = UrlList(0, config.shard_samples, "caption" in schema.names, files, settings)
    urls = _write(home, schema, (_plain(table, config, schema) for table in _read(store, names)), draft.rows_of_file)
    if not urls:
        raise InputError(f"{config.urls} lists no URL: give another list")
    frozen = UrlList(urls, draft.shard_samples, draft.captions, files, settings)
    home.replace(FROZEN, json.dumps(asdict(frozen), indent=1).encode())
    return frozen


def read_frozen(home: Store, frozen: UrlList) -> Iterator[tuple[int, pa.Table]]:
    """(number of its first URL, table of url and refused) of each frozen file."""
    for start in range(0, frozen.urls, frozen.rows_of_file):
        with home.open(f"{FOLDER}/{start // frozen.rows_of_file:05d}.parquet") as file:
            yield start, ParquetFile(file).read(["url", "refused"])


def _check(config: DownloadConfig) -> None:
    if not config.urls:
        raise ConfigError("end2end needs --urls FILE: a list of images' URLs")
    for name in ("image_size", "shard_samples", "download_threads"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}, not 1 or more")
    if taken := KEYS_OF_IMG2DATASET.intersection(config.save_columns):
        raise ConfigError(f"save_columns cannot have {', '.join(sorted(taken))}: img2dataset writes columns so named")


def _files(urls: str, options: dict[str, Any]) -> tuple[Store, list[str]]:
    """Where the list lies, and the names of its files: itself, those of a folder, or of `filter`'s rows."""
    folder, _, base = absolute(urls).rstrip("/").rpartition("/")
    store = Store(folder or "/", options)
    for inside in (f"{base}/rows", base):
        names = [name for name in store.list(inside) if _format(name) in READERS]
        if names and (inside == base or store.exists(f"{base}/filter.json")):
            return store, [f"{inside}/{name}" for name in names]
    if store.list(base) or not store.exists(base):
        raise InputError(f"{urls} is no URL list and no folder of some: give a file ({', '.join(READERS)})")
    return store, [base]


def _schema(config: DownloadConfig, store: Store, names: Sequence[str]) -> pa.Schema:
    """What is frozen: url, caption if there is one, refused, and the kept columns in types that JSON has."""
    kinds: dict[str, pa.DataType] = {}
    for name in names:
        found = _columns(store, name)
        for column in (config.url_column, *config.save_columns):
            if found.names and column not in found.names:
                had = ", ".join(found.names[:20])
                raise ConfigError(f"{store.display(name)} has no column {column!r} (see --url-column); it has {had}")
        if config.caption_column not in ("caption", *found.names):
            raise ConfigError(f"{store.display(name)} has no column {config.caption_column!r}: mend --caption-column")
        for column in found.names:
            kinds[column] = _common(kinds.get(column, pa.null()), found.field(column).type)
    captions = [("caption", pa.string())] if config.caption_column in kinds else []
    kept = [
        (name, kinds[name] if name in kinds and kinds[name] != pa.null() else pa.string())
        for name in config.save_columns
    ]
    return pa.schema([("url", pa.string()), *captions, ("refused", pa.string()), *kept])


def _columns(store: Store, name: str) -> pa.Schema:
    if _format(name) != "parquet":
        schema = pa.schema([])
        with contextlib.closing(_read(store, [name])) as tables:
            for table in tables:
                schema = table.schema
                if "json" not in _format(name):  # an object may have what those before it had not
                    break
        return schema
    with store.open(name) as file:
        try:
            return ParquetFile(file).schema
        except pa.ArrowInvalid as error:
            raise _unreadable(store, name, error) from None


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type that holds a column's values of two files: whole numbers, numbers, truth values, or else text."""
    kinds = {
        pa.int64()
        if pa.types.is_integer(kind) and kind != pa.uint64()
        else pa.float64()
        if pa.types.is_floating(kind)
        else kind
        if pa.types.is_boolean(kind)
        else pa.string()
        for kind in (one, other)
        if not pa.types.is_null(kind)
    }
    if kinds == {pa.int64(), pa.float64()}:
        return pa.float64()
    return kinds.pop() if len(kinds) == 1 else pa.string() if kinds else pa.null()


def _plain(table: pa.Table, config: DownloadConfig, schema: pa.Schema) -> pa.Table:
    """A piece of the list as it is frozen."""
    names = {"url": config.url_column, "caption": config.caption_column}
    columns: dict[str, Any] = {}
    for field in schema:
        name = names.get(field.name, field.name)
        there = name in table.column_names
        columns[field.name] = _cast(table[name], field.type) if there else pa.nulls(len(table), field.type)
    url = pc.utf8_trim_whitespace(columns["url"])
    good = pc.fill_null(pc.match_substring_regex(url, r"^(?i)https?://[^/]"), False)
    columns["url"] = pc.if_else(good, url, None)
    columns["refused"] = pc.if_else(good, None, pc.fill_null(url, ""))
    return pa.table(columns, schema=schema)


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # lists, structs: as JSON
        values = [None if value is None else json.dumps(value, default=str) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(values, pa.string())])


def _write(home: Store, schema: pa.Schema, tables: Iterable[pa.Table], rows_of_file: int) -> int:
    """Write files of `rows_of_file` rows, the last one shorter; how many rows there were."""
    rows, rest = 0, iter(tables)
    waiting = next(rest, None)
    while waiting is not None:
        with (
            home.writer(f"{FOLDER}/{rows // rows_of_file:05d}.parquet") as file,
            pq.ParquetWriter(file, schema, compression="zstd") as writer,
        ):
            room = rows_of_file
            while waiting is not None and room:
                writer.write_table(waiting.slice(0, room))
                taken = min(room, len(waiting))
                room, rows, waiting = room - taken, rows + taken, waiting.slice(taken)
                if not len(waiting):
                    waiting = next(rest, None)
    return rows
