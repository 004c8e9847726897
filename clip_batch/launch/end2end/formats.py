"""Reading URL lists: Parquet, CSV, TSV, JSON, JSON lines and plain text; all but Parquet may be gzipped.

Text is UTF-8, or UTF-16 with its byte-order mark. An error names the line.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain, islice
from typing import IO, Any

import pyarrow as pa

from clip_batch.config import DownloadConfig
from clip_batch.errors import InputError, StorageUnavailable, one_line
from clip_batch.storage.arrow import UNREADABLE, ParquetFile
from clip_batch.storage.store import Store
from clip_batch.storage.text import as_caption, as_text, encodable, encoding

BATCH = 10_000
"""Rows that are in memory at a time, for formats that can be read in pieces."""

_CSV_FIELD_BYTES = 2**24
"""The longest CSV cell that is read."""

_URL = re.compile(r"\s*https?://[^/]", re.IGNORECASE)

Reader = Callable[[IO[bytes], DownloadConfig], Iterator[pa.Table]]
Row = tuple[int, list[str]]
"""A row of a CSV or TSV: the number of its first line, and its cells."""


def read_tables(store: Store, names: Iterable[str], config: DownloadConfig) -> Generator[pa.Table]:
    """Yield the rows of the files in pieces. Raises InputError, which names the file, if one cannot be read."""
    for name in names:
        with readable(store, name), store.open(name) as raw, _unzipped(raw, name) as file:
            for table in READERS.get(format_of(name), _read_text)(file, config):
                if len(table):
                    yield table


@contextlib.contextmanager
def readable(store: Store, name: str) -> Iterator[None]:
    """Raise InputError if the block finds that a file cannot be read in the format of its name."""
    try:
        yield
    except StorageUnavailable:
        raise
    except (ValueError, RecursionError, EOFError, OSError, zlib.error, *UNREADABLE) as error:
        where, reason = store.display(name), one_line(error, 300)
        raise InputError(
            f"{where} cannot be read as a {format_of(name)} list: {reason}; correct it or its name"
        ) from None


def format_of(name: str) -> str:
    """Return a file name's extension in lower case, without .gz."""
    return name.lower().removesuffix(".gz").rpartition(".")[2]


def _unzipped(file: IO[bytes], name: str) -> Any:
    return gzip.open(file) if name.lower().endswith(".gz") else file


def _lines(file: IO[bytes], newline: str | None = None) -> Iterator[str]:
    """Yield the lines of a text file; `newline` as `open` takes it. Raises ValueError, with the line's number."""
    buffered = io.BufferedReader(file)  # type: ignore[type-var]  # files of stores are readable as raw ones are
    codec = encoding(buffered.peek(4)[:4])
    with io.TextIOWrapper(buffered, codec, errors="surrogateescape", newline=newline) as lines:
        for number, line in enumerate(lines, 1):
            if not line.isascii() and line != encodable(line):
                raise ValueError(f"line {number} is not {codec.upper()}: convert the file, as with iconv -t UTF-8")
            yield line


def _read_parquet(file: IO[bytes], config: DownloadConfig) -> Iterator[pa.Table]:
    return ParquetFile(file).pieces(BATCH)


def _read_text(file: IO[bytes], config: DownloadConfig) -> Iterator[pa.Table]:
    """Read one URL a line; blank lines are skipped."""
    urls = (url for line in _lines(file) if (url := line.strip()))
    while piece := list(islice(urls, BATCH)):
        yield pa.table({config.url_column: piece})


def _read_csv(file: IO[bytes], config: DownloadConfig) -> Iterator[pa.Table]:
    quoted = config.list_quotes != "no"
    return _tables(_quoted(file, ",") if quoted else _unquoted(file, ","), config, ",")


def _read_tsv(file: IO[bytes], config: DownloadConfig) -> Iterator[pa.Table]:
    quoted = config.list_quotes == "yes"
    return _tables(_quoted(file, "\t") if quoted else _unquoted(file, "\t"), config, "\t")


def _quoted(file: IO[bytes], delimiter: str) -> Iterator[Row]:
    """Yield the rows of a file in which a quote at the start of a cell begins a quoted cell."""
    limit = csv.field_size_limit(_CSV_FIELD_BYTES)  # the limit of the whole process, so it is restored below
    try:
        reader, line = csv.reader(_lines(file, ""), delimiter=delimiter, strict=True), 1
        try:
            for cells in reader:
                if cells:
                    yield line, cells
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"the row of line {line}: {error}; --list-quotes no if its quotes are text") from None
    finally:
        csv.field_size_limit(limit)


def _unquoted(file: IO[bytes], delimiter: str) -> Iterator[Row]:
    """Yield the rows of a file in which quotes are text, so that no cell has a line end or the delimiter."""
    for number, line in enumerate(_lines(file, "\n"), 1):
        if text := line.rstrip("\r\n"):
            yield number, text.split(delimiter)


def _tables(rows: Iterator[Row], config: DownloadConfig, delimiter: str) -> Iterator[pa.Table]:
    """Yield rows as tables of strings, named by the header; see `_headless` for a file without one."""
    if (first := next(rows, None)) is None:
        return
    header = first[1]
    if names := _headless(header, config, delimiter):
        header, rows = names, chain([first], rows)
    for name in (config.url_column, config.caption_column, *config.save_columns):
        if header.count(name) > 1:
            raise ValueError(f"its header has the column {name!r} {header.count(name)} times")
    while piece := list(islice(rows, BATCH)):
        for line, cells in piece:
            if len(cells) != len(header):
                count = f"line {line} has {len(cells)} cells, the header {len(header)}"
                raise ValueError(f"{count}: {cells!r:.150} (are quotes text or not? see --list-quotes)")
        columns = [pa.array(column, pa.string()) for column in zip(*(cells for _, cells in piece), strict=True)]
        yield pa.table(dict(zip(header, columns, strict=True)))


def _headless(first: list[str], config: DownloadConfig, delimiter: str) -> list[str] | None:
    """Return the columns' names of a file whose first row holds a URL: it has no header. None if it has one.

    Of two columns one is the URL and the other the caption, in either order, as in Conceptual Captions. Raises
    ValueError if it is not clear which column is which.
    """
    urls = [place for place, cell in enumerate(first) if _URL.match(cell)]
    if not urls:
        return None
    if len(urls) > 1 or len(first) > 2:
        header = delimiter.join((config.url_column, config.caption_column, "..."))
        raise ValueError(f"line 1 holds a URL, not the columns' names: put a line before it such as {header!r}")
    return [config.url_column if place in urls else config.caption_column for place in range(len(first))]


def _read_json(file: IO[bytes], config: DownloadConfig) -> Iterator[pa.Table]:
    """Read an array of objects, or hits as the page, the service and `search --json` write them."""
    content = json.loads("".join(_lines(file, "")))
    if isinstance(content, dict):
        content = content.get("hits", [content])
    if not isinstance(content, list):
        raise ValueError("it is no array of objects")
    return _objects(((f"item {number}", item) for number, item in enumerate(content, 1)), config)


def _read_jsonl(file: IO[bytes], config: DownloadConfig) -> Iterator[pa.Table]:
    """Read one object a line; blank lines are skipped."""

    def rows() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(_lines(file, "\n"), 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"line {number} is no JSON: {error}") from None

    return _objects(rows(), config)


def _objects(rows: Iterator[tuple[str, Any]], config: DownloadConfig) -> Iterator[pa.Table]:
    """Yield JSON objects as tables of strings; other values become JSON texts, and a hit's metadata become columns."""
    names: dict[str, None] = {}
    while piece := list(islice(rows, BATCH)):
        for place, row in piece:
            if not isinstance(row, dict):
                raise ValueError(f"{place} is {row!r:.100}, no object with a url")
        flat = [{**row, **row["metadata"]} if isinstance(row.get("metadata"), dict) else row for _, row in piece]
        names.update(dict.fromkeys(name for row in flat for name in row))
        convert = {name: as_caption if name == config.caption_column else as_text for name in names}
        yield pa.table({name: pa.array([convert[name](row.get(name)) for row in flat], pa.string()) for name in names})


READERS: dict[str, Reader] = {
    "parquet": _read_parquet,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "ndjson": _read_jsonl,
    "txt": _read_text,
}
"""The reader of each extension; a file with any other extension is read as text."""
