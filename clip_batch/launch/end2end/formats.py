"""Reading URL lists: Parquet, CSV, TSV, JSON, JSON lines and plain text; all but Parquet may be gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from typing import IO, Any

import pyarrow as pa

from clip_batch.errors import InputError, one_line
from clip_batch.storage.arrow import ParquetFile
from clip_batch.storage.store import Store

BATCH = 10_000
"""Rows that are in memory at a time, for formats that can be read in pieces."""

_CSV_FIELD_BYTES = 2**24
"""The longest CSV cell that is read."""


def read_tables(store: Store, names: Iterable[str]) -> Generator[pa.Table]:
    """Yield the rows of the files in pieces. Raises InputError, which names the file, if one cannot be read."""
    for name in names:
        try:
            with store.open(name) as raw, _unzipped(raw, name) as file:
                for table in READERS.get(format_of(name), _read_text)(file):
                    if len(table):
                        yield table
        except (ValueError, EOFError, gzip.BadGzipFile, csv.Error) as error:
            raise unreadable(store, name, error) from None


def format_of(name: str) -> str:
    """Return a file name's extension in lower case, without .gz."""
    return name.lower().removesuffix(".gz").rpartition(".")[2]


def unreadable(store: Store, name: str, error: Exception) -> InputError:
    """Return the error for a file that cannot be read in the format of its name."""
    reason = one_line(error, 300)
    return InputError(
        f"{store.display(name)} cannot be read as a {format_of(name)} list: {reason}; correct it or its name"
    )


def _unzipped(file: IO[bytes], name: str) -> Any:
    return gzip.open(file) if name.lower().endswith(".gz") else file


def _read_parquet(file: IO[bytes]) -> Iterator[pa.Table]:
    return ParquetFile(file).pieces(BATCH)


def _read_text(file: IO[bytes]) -> Iterator[pa.Table]:
    """Read one URL a line; blank lines are skipped."""
    with io.TextIOWrapper(file, "utf-8-sig") as lines:
        urls = (url for line in lines if (url := line.strip()))
        while piece := list(islice(urls, BATCH)):
            yield pa.table({"url": piece})


def _read_csv(file: IO[bytes], delimiter: str = ",") -> Iterator[pa.Table]:
    limit = csv.field_size_limit(_CSV_FIELD_BYTES)  # the limit of the whole process, so it is restored below
    try:
        with io.TextIOWrapper(file, "utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            header = next(rows, [])
            while piece := list(islice((row for row in rows if row), BATCH)):
                if short := next((row for row in piece if len(row) != len(header)), None):
                    raise ValueError(f"a row has {len(short)} cells, the header {len(header)}: {short!r:.200}")
                columns = [pa.array(cells, pa.string()) for cells in zip(*piece, strict=True)]
                yield pa.table(dict(zip(header, columns, strict=True)))
    finally:
        csv.field_size_limit(limit)


def _read_tsv(file: IO[bytes]) -> Iterator[pa.Table]:
    return _read_csv(file, "\t")


def _read_json(file: IO[bytes]) -> Iterator[pa.Table]:
    """Read an array of objects, or hits as the page, the service and `search --json` write them."""
    content = json.load(file)
    if isinstance(content, dict):
        content = content.get("hits", [content])
    yield from _objects(iter(content))


def _read_jsonl(file: IO[bytes]) -> Iterator[pa.Table]:
    yield from _objects(json.loads(line) for line in file if line.strip())


def _objects(rows: Iterator[Any]) -> Iterator[pa.Table]:
    """Yield JSON objects as tables of strings; other values become JSON texts, and a hit's metadata become columns."""
    names: dict[str, None] = {}
    while piece := list(islice(rows, BATCH)):
        for row in piece:
            if not isinstance(row, dict):
                raise ValueError(f"{row!r:.100} is no object with a url")
        flat = [{**row, **row["metadata"]} if isinstance(row.get("metadata"), dict) else row for row in piece]
        names.update(dict.fromkeys(name for row in flat for name in row))
        yield pa.table({name: pa.array([_text(row.get(name)) for row in flat], pa.string()) for name in names})


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


READERS = {
    "parquet": _read_parquet,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "ndjson": _read_jsonl,
    "txt": _read_text,
}
"""The reader of each extension; a file with any other extension is read as text."""
