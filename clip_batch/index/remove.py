"""Removing rows from an index by values of a metadata column."""

from __future__ import annotations

import csv
import io
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clip_batch.config import StorageConfig
from clip_batch.config.paths import path_text
from clip_batch.config.texts import is_unicode
from clip_batch.errors import ConfigError, one_line
from clip_batch.index import removals, removed_rows
from clip_batch.index.manifest import Manifest, load_manifest
from clip_batch.index.metadata import MetadataFile
from clip_batch.index.paths import removal_list
from clip_batch.index.removals import RemovalList
from clip_batch.storage.store import Store, read_url
from clip_batch.storage.text import encoding
from clip_batch.types import StrPath, counted

Say = Callable[[str], None]

EXAMPLES = 5
"""Values without a row that a report names."""

SAMPLE = 10
"""Rows that a report shows."""


@dataclass(frozen=True)
class RemovedRow:
    """A row that `remove` removes; `score` is its cosine to the example, if one was given."""

    id: int
    key: str | None
    caption: str | None
    score: float | None = None


@dataclass(frozen=True)
class RemoveReport:
    """The list that `remove` recorded, by its `digest`, and what it removes from the live `version`.

    `rows` of the version have one of the `values` of `column`; `missing` values have no row, some of them as
    `examples`. By an example or a condition, `column` is "", `values` is 0, and `rows` were found; where there is none,
    nothing is recorded, and `digest` is "". `sample` has some of the rows: with `dry_run`, when nothing was written,
    or the best of those that an example found. `exact` is False where scores are of compressed vectors.
    """

    digest: str
    column: str
    values: int
    version: str
    rows: int
    missing: int
    examples: tuple[str, ...]
    dry_run: bool = False
    sample: tuple[RemovedRow, ...] = ()
    exact: bool = True


def remove(
    index: StrPath,
    keys: StrPath,
    column: str = "key",
    storage: StorageConfig = StorageConfig(),
    progress: Say = lambda line: None,
    note: str = "",
    dry_run: bool = False,
) -> RemoveReport:
    """Remove the rows that have one of the values of file `keys`, from every version there is or will be.

    `keys` is a path or URL of a text file of one value a line, or of a .parquet or .csv file with that column.
    Every row with such a value is removed, also where several have it. `note` is kept with the list; `dry_run` writes
    nothing. ConfigError: the file is not readable or has no value, the live version has no such column, or a value is
    no number where the column has numbers.
    """
    values = read_values(path_text(keys, "keys"), column, storage)
    return remove_values(index, values, column, storage, progress, note, dry_run)


def remove_values(
    index: StrPath,
    values: Sequence[str],
    column: str = "key",
    storage: StorageConfig = StorageConfig(),
    progress: Say = lambda line: None,
    note: str = "",
    dry_run: bool = False,
) -> RemoveReport:
    """As `remove`, with the values themselves. ConfigError: there is none."""
    store = Store(path_text(index, "index"), storage.storage_options)
    manifest = load_manifest(store)
    new = RemovalList.of(column, filter(None, values))
    if not new.values:
        raise ConfigError("keys has no value: nothing to remove")
    if wrong := next((value for value in new.values if not is_unicode(value)), None):
        raise ConfigError(f"keys has {reprlib.repr(wrong)}, which is no Unicode text: decode it anew")
    for shard in {shard.source: shard for shard in manifest.shards}.values():
        schema = removed_rows.read_schema(store, manifest.paths(shard).metadata(shard.name))
        removed_rows.check_column(new, schema)
    if not dry_run:
        removals.record(store, new, note)
        are = "is" if len(new.values) == 1 else "are"
        progress(f"{counted(len(new.values), 'value')} of {column} {are} removed, as {removal_list(new.digest)}")
    ((ids, missing),) = removed_rows.find_removed([new], removed_rows.fetch_metadata(store, manifest))
    if not dry_run:
        removed_rows.cache(store, manifest, new.digest, ids)
    some = tuple(_sample(store, manifest, ids[:SAMPLE])) if dry_run else ()
    counts = len(new.values), manifest.version, len(ids), len(missing)
    return RemoveReport(new.digest, column, *counts, missing[:EXAMPLES], dry_run, some)


def _sample(store: Store, manifest: Manifest, ids: removed_rows.Ids) -> Iterator[RemovedRow]:
    for shard in manifest.shards:
        if len(mine := ids[(ids >= shard.offset) & (ids < shard.offset + shard.rows)]):
            with store.fetch(manifest.paths(shard).metadata(shard.name)) as path:
                file = MetadataFile(path)
                shown = [name for name in ("key", "caption") if name in file.schema.names]
                rows = file.take(mine - shard.offset, shown).to_pylist() if shown else [{}] * len(mine)
            for id, row in zip(mine.tolist(), rows, strict=True):
                yield RemovedRow(id, row.get("key"), row.get("caption"))


def describe_report(report: RemoveReport) -> str:
    """What `remove` removed, or would remove, in a line for people, after a line for each row of the sample."""
    lines = [_sample_line(row) for row in report.sample]
    done = "would be removed" if report.dry_run else "removed"
    text = f"{counted(report.rows, 'row')} of the live version {done}"
    if report.column:
        text += f" by {counted(report.values, 'value')} of {report.column}"
        if report.missing:
            such = ", ".join(map(repr, report.examples))
            text += f"; {counted(report.missing, 'value')} without a row in it, such as {such}"
    else:
        text += "; rows that are added later stay: run it again after merge --add" if report.rows else ""
        text += "" if report.exact else "; scores are approximate, as the index compresses vectors"
    text += f"; --undo {report.digest} takes it back" if report.digest and not report.dry_run else ""
    return "\n".join([*lines, text])


def _sample_line(row: RemovedRow) -> str:
    score = [] if row.score is None else [f"{row.score:.3f}"]
    return "  ".join([f"{row.id:>9}", *score, *(one_line(text, 100) for text in (row.key, row.caption) if text)])


def read_values(keys: str, column: str, storage: StorageConfig = StorageConfig()) -> list[str]:
    """The values of a key file as text, without empty ones; see `remove`. ConfigError if there is none."""
    try:
        data = read_url(keys, storage.storage_options)
        values = [value for value in _parse(data, keys, column) if value]
    except FileNotFoundError:
        remedy = "name a file that has a value on each line"
        raise ConfigError(f"the file of keys {keys} does not exist: {remedy}") from None
    except PermissionError:
        raise ConfigError(f"the file of keys {keys} may not be read: mend its permissions") from None
    except (OSError, ValueError, csv.Error) as error:
        reason = one_line(error, 200)
        raise ConfigError(f"the file of keys {keys} cannot be read ({reason}): give text, Parquet or CSV") from None
    if not values:
        raise ConfigError(f"the file of keys {keys} has no value: nothing to remove")
    return values


def _parse(data: bytes, keys: str, column: str) -> list[str]:
    if keys.lower().endswith(".parquet"):
        return _parquet_values(data, keys, column)
    lines = io.StringIO(data.decode(encoding(data[:4])), newline="" if keys.lower().endswith(".csv") else None)
    if keys.lower().endswith(".csv"):
        rows = csv.DictReader(lines, strict=True)
        _check_column(column, list(rows.fieldnames or ()), keys)
        return list(_csv_values(rows, column))
    return [line.rstrip("\n") for line in lines if line.strip()]


def _csv_values(rows: csv.DictReader[str], column: str) -> Iterator[str]:
    """The values of a column. ValueError, with the line, if a row has other cells than the header or an open quote."""
    line = rows.line_num + 1
    try:
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(f"the row of line {line} has not as many cells as the header")
            yield row[column]
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"the row of line {line}: {error}") from None


def _parquet_values(data: bytes, keys: str, column: str) -> list[str]:
    import pyarrow as pa

    from clip_batch.storage.arrow import ParquetFile

    file = ParquetFile(io.BytesIO(data))
    _check_column(column, file.schema.names, keys)
    values = file.read([column])[column].drop_null()
    kind: Any = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise ConfigError(f"the file of keys {keys}: column {column!r} is {kind}: give text or whole numbers")
    return [str(value) for value in values.to_pylist()]


def _check_column(column: str, names: list[str], keys: str) -> None:
    if column not in names:
        raise ConfigError(f"the file of keys {keys} has no column {column!r}: there are {', '.join(names)}")
