"""A URL list of any format, frozen as Parquet files that img2dataset reads unchanged.

    DIR/urls/00000.parquet   url, caption, refused and the saved columns, in the order of the list
    DIR/urls.json            written last: the number of URLs, the source files and the options

As the list is frozen, the n-th URL stays the same when a download is resumed, and img2dataset's key identifies it.
`url` is null where the list has no http(s) URL; `refused` then holds what the list has there.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clip_batch.config import DownloadConfig
from clip_batch.errors import ConfigError, InputError
from clip_batch.launch.end2end import paths
from clip_batch.launch.end2end.formats import READERS, format_of, read_tables, readable
from clip_batch.storage.arrow import ParquetFile, caption_column, text_column
from clip_batch.storage.paths import absolute, split_url
from clip_batch.storage.store import Store

FILE_URLS = 1_000_000
"""URLs in a frozen file, rounded up to whole shards, because img2dataset starts a new shard with each file."""

FIXED_OPTIONS = (
    *("url_column", "caption_column", "list_quotes", "save_columns"),
    *("image_size", "resize_mode", "img2dataset_options"),
)
"""Options that change what is downloaded, so a resumed download must have the same."""

RESERVED_COLUMNS = frozenset(
    {"key", "caption", "url", "width", "height", "original_width", "original_height", "status", "error_message"}
    | {"exif", "md5", "sha256", "sha512", "refused"}
)
"""Columns that img2dataset or this module writes; no column of the list can be saved under these names."""


@dataclass(frozen=True)
class UrlList:
    """A frozen list. Shard s has its URLs [s * shard_samples, (s + 1) * shard_samples).

    `files` has [name, size, modification time] of each source file; `options` has the values of FIXED_OPTIONS. `notes`
    are lines for people about what was mended or missed.
    """

    urls: int
    shard_samples: int
    captions: bool
    files: list[list[Any]]
    options: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def shards(self) -> int:
        """The number of shards."""
        return math.ceil(self.urls / self.shard_samples)

    @property
    def rows_of_file(self) -> int:
        """The number of URLs in each frozen file but the last."""
        return math.ceil(FILE_URLS / self.shard_samples) * self.shard_samples

    def rows(self, keys: pa.Array | pa.ChunkedArray) -> Any:
        """Return the places (n,) int64 in the list of the samples with these keys.

        img2dataset makes a key of the shard's number and the place in the shard, with as many digits as that needs.
        """
        scale = int(10 ** math.ceil(math.log10(self.shard_samples)))
        numbers = pc.cast(keys, pa.int64()).to_numpy()
        return numbers // scale * self.shard_samples + numbers % scale


def freeze(config: DownloadConfig, home: Store, options: dict[str, Any]) -> UrlList:
    """Freeze the list in DIR and return it; if the same list is frozen there already, return that one.

    A different list replaces it as long as no shard is downloaded. Raises ConfigError if an option is wrong or shards
    of another list are there, and InputError if the list cannot be read.
    """
    _check(config)
    store, names = _list_files(config.urls, options)
    files = [[store.display(name), store.size(name), store.modified(name)] for name in names]
    settings = {name: getattr(config, name) for name in FIXED_OPTIONS}
    if home.exists(paths.URL_LIST) and any(name.endswith(paths.STATS_SUFFIX) for name in home.list(paths.IMAGES)):
        earlier = UrlList(**home.read_json(paths.URL_LIST))
        new = {**settings, "files": files, "shard_samples": config.shard_samples}
        old = {"list_quotes": "auto", **earlier.options, "files": earlier.files, "shard_samples": earlier.shard_samples}
        if different := [name for name in new if new[name] != old[name]]:
            raise ConfigError(
                f"{home.url} holds another download: {', '.join(different)} differ; give another --output"
            )
        return earlier
    schema, notes = _schema(config, store, names)
    home.remove(paths.URL_LIST)
    home.remove_folder(paths.URLS)
    draft = UrlList(0, config.shard_samples, "caption" in schema.names, files, settings)
    undecodable = Counter[str]()
    tables = (_normalized(table, config, schema, undecodable) for table in read_tables(store, names, config))
    urls = _write(home, schema, tables, draft.rows_of_file)
    if not urls:
        raise InputError(f"{config.urls} lists no URL: give another list")
    notes += [f"{count:,} cells of {name} have bytes that are not UTF-8" for name, count in undecodable.items()]
    url_list = UrlList(urls, draft.shard_samples, draft.captions, files, settings, notes)
    home.replace(paths.URL_LIST, json.dumps(asdict(url_list), indent=1).encode())
    return url_list


def read_frozen(home: Store, url_list: UrlList) -> Iterator[tuple[int, pa.Table]]:
    """Yield, for each frozen file, the place of its first URL in the list and a table of `url` and `refused`."""
    for start in range(0, url_list.urls, url_list.rows_of_file):
        with home.open(paths.urls(start // url_list.rows_of_file)) as file:
            yield start, ParquetFile(file).read(["url", "refused"])


def _check(config: DownloadConfig) -> None:
    if not config.urls:
        raise ConfigError("end2end needs --urls FILE: a list of images' URLs")
    if reserved := RESERVED_COLUMNS.intersection(config.save_columns):
        raise ConfigError(f"save_columns cannot have {', '.join(sorted(reserved))}: img2dataset writes these columns")


def _list_files(urls: str, options: dict[str, Any]) -> tuple[Store, list[str]]:
    """Return the store of the list and the names of its files: one file, those of a folder, or the rows of `filter`."""
    folder, base = split_url(absolute(urls).rstrip("/"))
    store = Store(folder, options)
    for inside in (f"{base}/rows", base):
        names = [name for name in store.list(inside) if format_of(name) in READERS]
        if names and (inside == base or store.exists(f"{base}/filter.json")):
            return store, [f"{inside}/{name}" for name in names]
    if store.list(base) or not store.exists(base):
        raise InputError(f"{urls} is no URL list and no folder of URL lists: give a file ({', '.join(READERS)})")
    return store, [base]


def _schema(config: DownloadConfig, store: Store, names: Sequence[str]) -> tuple[pa.Schema, list[str]]:
    """Return the schema of the frozen list (url, caption if there is one, refused, the saved columns), and notes.

    A saved column has the type that holds its values in all files, or text where JSON has no such type.
    """
    types: dict[str, pa.DataType] = {}
    for name in names:
        columns = _file_schema(store, name, config)
        where = f"{store.display(name)} has no column"
        _require(config.url_column, columns.names, "--url-column", where)
        for column in config.save_columns:
            _require(column, columns.names, "--save-columns", where)
        if config.caption_column != "caption" or _alike("caption", columns.names):
            _require(config.caption_column, columns.names, "--caption-column", where)
        for column in columns.names:
            types[column] = _common_type(types.get(column, pa.null()), columns.field(column).type)
    captions = [("caption", pa.string())] if config.caption_column in types else []
    saved = [
        (name, types[name] if name in types and types[name] != pa.null() else pa.string())
        for name in config.save_columns
    ]
    notes = []
    if not captions and (others := [name for name in types if name != config.url_column]):
        notes.append(f"no captions: there is no column 'caption', but {', '.join(others[:20])}: see --caption-column")
    return pa.schema([("url", pa.string()), *captions, ("refused", pa.string()), *saved]), notes


def _require(column: str, names: Sequence[str], option: str, where: str) -> None:
    """Raise ConfigError, with the columns that there are, if a file of rows lacks a column."""
    if names and column not in names:
        alike = _alike(column, names)
        remedy = f"correct {option}" if alike is None else f"give {option} {alike}"
        if f'"{column}"' in names:
            remedy = "its cells are in quotes, so give --list-quotes yes"
        elif len(names) == 1 and (found := [mark for mark in ("\t", ";", ",", "|") if mark in names[0]]):
            remedy = f"its cells are separated by {found[0]!r}: .csv means commas, .tsv tabs"
        raise ConfigError(f"{where} {column!r}, but {', '.join(names[:20])}: {remedy}")


def _alike(column: str, names: Sequence[str]) -> str | None:
    """Return a name that differs from a column's only by case or spaces, or by quotes; None if there is none."""
    return next((name for name in names if name.strip('" ').lower() == column.lower()), None)


def _file_schema(store: Store, name: str, config: DownloadConfig) -> pa.Schema:
    """Return the columns of one file of the list and their types."""
    if format_of(name) != "parquet":
        schema = pa.schema([])
        with contextlib.closing(read_tables(store, [name], config)) as tables:
            for table in tables:
                schema = table.schema
                if "json" not in format_of(name):  # a later JSON object may have further fields, so all are read
                    break
        return schema
    with readable(store, name), store.open(name) as file:
        return ParquetFile(file).schema


def _common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return the type that holds a column's values of two files: int64, double, bool, or otherwise string."""
    types = {_json_type(arrow_type) for arrow_type in (one, other) if not pa.types.is_null(arrow_type)}
    if types == {pa.int64(), pa.float64()}:
        return pa.float64()
    return types.pop() if len(types) == 1 else pa.string() if types else pa.null()


def _json_type(arrow_type: pa.DataType) -> pa.DataType:
    if pa.types.is_integer(arrow_type) and arrow_type != pa.uint64():
        return pa.int64()
    if pa.types.is_floating(arrow_type):
        return pa.float64()
    return arrow_type if pa.types.is_boolean(arrow_type) else pa.string()


def _normalized(table: pa.Table, config: DownloadConfig, schema: pa.Schema, undecodable: Counter[str]) -> pa.Table:
    """Return a piece of the list in the schema of the frozen list, and count the cells with U+FFFD by column."""
    sources = {"url": config.url_column, "caption": config.caption_column}
    columns: dict[str, Any] = {}
    for column in schema:
        name = sources.get(column.name, column.name)
        if name not in table.column_names:
            columns[column.name] = pa.nulls(len(table), column.type)
        elif column.name == "caption":
            columns[column.name] = caption_column(table[name])
        else:
            columns[column.name] = _cast(table[name], column.type)
        if column.type == pa.string() and (count := pc.sum(pc.match_substring(columns[column.name], "\ufffd")).as_py()):
            undecodable[name] += count
    url = pc.utf8_trim_whitespace(columns["url"])
    valid = pc.fill_null(pc.match_substring_regex(url, r"^(?i)https?://[^/]"), False)
    columns["url"] = pc.if_else(valid, url, None)
    columns["refused"] = pc.if_else(valid, None, pc.fill_null(url, ""))
    return pa.table(columns, schema=schema)


def _cast(column: pa.ChunkedArray, arrow_type: pa.DataType) -> pa.ChunkedArray:
    """Return the column cast to a type; whole numbers that a double cannot hold are rounded, as pandas does."""
    if arrow_type == pa.string():
        return text_column(column)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(arrow_type, safe=not pa.types.is_floating(arrow_type))


def _write(home: Store, schema: pa.Schema, tables: Iterable[pa.Table], rows_of_file: int) -> int:
    """Write the tables as files of `rows_of_file` rows, the last one shorter, and return the number of rows."""
    rows, remaining = 0, iter(tables)
    table = next(remaining, None)
    while table is not None:
        with (
            home.writer(paths.urls(rows // rows_of_file)) as file,
            pq.ParquetWriter(file, schema, compression="zstd") as writer,
        ):
            room = rows_of_file
            while table is not None and room:
                writer.write_table(table.slice(0, room))
                written = min(room, len(table))
                room, rows, table = room - written, rows + written, table.slice(written)
                if not len(table):
                    table = next(remaining, None)
    return rows
