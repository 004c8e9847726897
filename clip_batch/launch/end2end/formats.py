"""Reading URL lists: Parquet, CSV, TSV, JSON, JSON lines and plain text, each with or without gzip."""

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
"""Rows that are held at a time where a format can be read in pieces."""


def _format(name: str) -> str:
    return name.lower().removesuffix(".gz").rpartition(".")[2]


def _read(store: Store, names: Iterable[str]) -> Generator[pa.Table]:
    """The files' rows in pieces. InputError names the file that cannot be read."""
    for name in names:
        try:
            with store.open(name) as raw, _unzipped(raw, name) as file:
                for table in READERS.get(_format(name), _read_text)(file):
                    if len(table):
                        yield table
        except (ValueError, EOFError, gzip.BadGzipFile, csv.Error) as error:
            raise _unreadable(store, name, error) from None


def _unreadable(store: Store, name: str, error: Exception) -> InputError:
    said = one_line(error, 300)
    return InputError(f"{store.display(name)} cannot be read as a {_format(name)} list: {said}; mend it or its name")


def _unzipped(file: IO[bytes], name: str) -> Any:
    return gzip.open(file) if name.lower().endswith(".gz") else file


def _read_parquet(file: IO[bytes]) -> Iterator[pa.Table]:
    return ParquetFile(file).pieces(BATCH)


def _read_text(file: IO[bytes]) -> Iterator[pa.Table]:
    """A URL a line; blank lines are none."""
    with io.TextIOWrapper(file, "utf-8-sig") as lines:
        urls = (url for line in lines if (url := line.strip()))
        while piece := list(islice(urls, BATCH)):
            yield pa.table({"url": piece})


def _read_csv(file: IO[bytes], delimiter: str = ",") -> Iterator[pa.Table]:
    limit = csv.field_size_limit(2**24)  # the whole process's
    try:
        with io.TextIOWrapper(file, "utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            head = next(rows, [])
            while piece := list(islice((row for row in rows if row), BATCH)):
                if wrong := next((row for row in piece if len(row) != len(head)), None):
                    raise ValueError(f"a row has {len(wrong)} cells, the head {len(head)}: {wrong!r:.200}")
                columns = [pa.array(cells, pa.string()) for cells in zip(*piece, strict=True)]
                yield pa.table(dict(zip(head, columns, strict=True)))
    finally:
        csv.field_size_limit(limit)


def _read_tsv(file: IO[bytes]) -> Iterator[pa.Table]:
    return _read_csv(file, "\t")


def _read_json(file: IO[bytes]) -> Iterator[pa.Table]:
    """An array of objects, or of hits as the page, the service and `search --json` give them."""
    found = json.load(file)
    if isinstance(found, dict):
        found = found.get("hits", [found])
    yield from _objects(iter(found))


def _read_jsonl(file: IO[bytes]) -> Iterator[pa.Table]:
    yield from _objects(json.loads(line) for line in file if line.strip())


def _objects(rows: Iterator[Any]) -> Iterator[pa.Table]:
    """Objects as tables of text; what is not text is JSON. A hit's metadata are its columns."""
    names: dict[str, None] = {}
    while piece := list(islice(rows, BATCH)):
        if wrong := next((row for row in piece if not isinstance(row, dict)), None):
            raise ValueError(f"{wrong!r:.100} is no object with a url")
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
"""By a name's extension, with .gz or without; any other file is read as text."""
