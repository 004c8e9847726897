"""The versions of an index: list them, roll back or forward, remove rows from all of them, drop old ones.

Nothing here builds anything. A version is a folder of 12 hex digits; it is finished once its manifest
stands, and live while CURRENT names it.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from clip_batch.config import StorageConfig
from clip_batch.errors import ConfigError, CorruptError, one_line
from clip_batch.index import removals
from clip_batch.index.ann.recall import Recall
from clip_batch.index.manifest import Manifest, current_version, load_manifest, make_current
from clip_batch.index.paths import CURRENT, VersionPaths, is_version, removal_list
from clip_batch.storage.store import Store, read_url

EXAMPLES = 5
"""Values without a row that a report names."""


@dataclass(frozen=True)
class VersionInfo:
    """One version. `alive` are its rows that are not removed, None where that is not known without a scan.

    `created` is Unix seconds. `key` and `recall` are the manifest's, `base` the version it was added
    to. An unfinished version has no more than its name; with a `problem`, its manifest is not readable.
    """

    version: str
    live: bool
    finished: bool
    created: float = 0.0
    rows: int = 0
    alive: int | None = None
    key: dict[str, str] = field(default_factory=dict)
    recall: dict[str, dict[str, Recall]] = field(default_factory=dict)
    base: str = ""
    problem: str = ""


@dataclass(frozen=True)
class RemoveReport:
    """What `remove` did: of so many `values`, `missing` have no row in the live `version`, `examples` among them.

    `rows` are the rows of that version that have one of the others.
    """

    digest: str
    column: str
    values: int
    version: str
    rows: int
    missing: int
    examples: tuple[str, ...]


def versions(store: Store) -> list[VersionInfo]:
    """All versions of INDEX, the oldest first, unfinished ones last."""
    live = current_version(store)
    found = [_info(store, version, version == live) for version in _folders(store)]
    return sorted(found, key=lambda info: (not info.finished, info.created, info.version))


def _folders(store: Store) -> list[str]:
    return [name for name in store.list("") if is_version(name)]


def _info(store: Store, version: str, live: bool) -> VersionInfo:
    try:
        manifest = load_manifest(store, version)
    except CorruptError as error:
        there = store.exists(VersionPaths(version).manifest)
        return VersionInfo(version, live, finished=False, problem=str(error) if there else "")
    gone = removals.removed_if_known(store, manifest)
    return VersionInfo(
        version,
        live,
        finished=True,
        created=manifest.created,
        rows=manifest.rows,
        alive=None if gone is None else manifest.rows - len(gone),
        key=manifest.key,
        recall=manifest.recall,
        base=manifest.base,
    )


def describe(found: Sequence[VersionInfo]) -> str:
    """Versions as lines for people; the live one is starred."""
    return "\n".join(map(_line, found)) or "no versions"


def _line(info: VersionInfo) -> str:
    start = f"{'*' if info.live else ' '} {info.version}"
    if not info.finished:
        return f"{start}  {info.problem or 'not finished'}"
    removed = "removals not counted yet" if info.alive is None else f"{info.rows - info.alive:,} removed"
    kinds = [f"{modality} {key}{_recall(info.recall.get(modality, {}))}" for modality, key in info.key.items()]
    base = [f"added to {info.base}"] if info.base else []
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.created))
    return "; ".join([f"{start}  {when}  {info.rows:,} rows, {removed}", *kinds, *base])


def _recall(measured: dict[str, Recall]) -> str:
    lines = ", ".join(f"{line['10']:.3f} for {kind} queries" for kind, line in measured.items())
    return f" (recall@10 {lines})" if lines else ""


def use(store: Store, version: str) -> Manifest:
    """Make a finished version the live one: roll back, or forward again. Rows that were removed stay removed.

    First all its files are looked at, and what tombstones remove from it is worked out. ConfigError:
    there is no such finished version, or a tombstone's column is not in it. CorruptError: a file is
    absent or of another size.
    """
    manifest = _finished(store, version)
    with ThreadPoolExecutor(16) as pool:
        for problem in pool.map(lambda file: _problem(store, file[0], file[1]["bytes"]), manifest.files.items()):
            if problem:
                raise CorruptError(f"{problem}: use another version, or drop this one and merge again")
    removals.removed(store, manifest, _metadata(store, manifest))
    before = current_version(store)
    make_current(store, version)
    if store.exists(VersionPaths(version).manifest):
        return manifest
    if current_version(store) == version:  # `drop` came between: it takes the manifest away first
        make_current(store, before) if before else store.remove(CURRENT)
    raise ConfigError(f"{store.display(version)} was dropped meanwhile: {before or 'nothing'} serves as before")


def _finished(store: Store, version: str) -> Manifest:
    there = [name for name in _folders(store) if store.exists(VersionPaths(name).manifest)]
    if version not in there:
        known = ", ".join(there) or "none: run clip-batch merge"
        raise ConfigError(f"{store.url} has no finished version {version!r}; there are {known}")
    return load_manifest(store, version)


def _problem(store: Store, name: str, size: int) -> str | None:
    try:
        found = store.size(name)
    except FileNotFoundError:
        return f"{store.display(name)} is missing"
    return None if found == size else f"{store.display(name)} has {found} bytes, not {size} as recorded"


def _metadata(store: Store, manifest: Manifest) -> Iterator[tuple[str, int]]:
    """(local path, id of the first row) of each shard's metadata; a copy is gone when the next one is asked for."""
    for shard in manifest.shards:
        with store.fetch(manifest.paths(shard).metadata(shard.name)) as path:
            yield path, shard.offset


def remove(
    index: str,
    keys: str,
    column: str = "key",
    storage: StorageConfig = StorageConfig(),
    progress: Callable[[str], None] = lambda line: None,
) -> RemoveReport:
    """Remove the rows that have one of the values of file `keys`, from every version there is or will be.

    `keys` is a path or URL: a text file of one value a line, or a .parquet or .csv with that column.
    Every row with such a value goes, were there several. ConfigError: the file is not readable or
    has no value, the live version has no such column, or a value is no number where the column has numbers.
    """
    store = Store(index, storage.storage_options)
    manifest = load_manifest(store)
    wanted = removals.make(column, read_values(keys, column, storage))
    for source in {shard.source: shard for shard in manifest.shards}.values():
        removals.check(wanted, removals.read_schema(store, manifest.paths(source).metadata(source.name)))
    digest = removals.add(store, column, wanted.values)
    progress(f"{len(wanted.values):,} values of {column} are removed, as {removal_list(digest)}")
    (found,) = removals.resolve([wanted], _metadata(store, manifest))
    removals.keep(store, manifest, digest, found.ids)
    missing = found.missing
    return RemoveReport(
        digest, column, len(wanted.values), manifest.version, len(found.ids), len(missing), missing[:EXAMPLES]
    )


def read_values(keys: str, column: str, storage: StorageConfig = StorageConfig()) -> list[str]:
    """The values of a key file as text, empty ones left out; see `remove`. ConfigError where there is none."""
    try:
        data = read_url(keys, storage.storage_options)
        values = [value for value in _parse(data, keys, column) if value]
    except (OSError, ValueError, csv.Error) as error:
        reason = one_line(error, 200)
        raise ConfigError(f"--keys {keys} cannot be read ({reason}): give text, Parquet or CSV") from None
    if not values:
        raise ConfigError(f"--keys {keys} has no value: nothing to remove")
    return values


def _parse(data: bytes, keys: str, column: str) -> list[str]:
    if keys.lower().endswith(".parquet"):
        return _parquet_values(data, keys, column)
    lines = io.StringIO(data.decode("utf-8-sig"), newline="" if keys.lower().endswith(".csv") else None)
    if keys.lower().endswith(".csv"):
        rows = csv.DictReader(lines)
        _check_column(column, list(rows.fieldnames or ()), keys)
        return [row[column] or "" for row in rows]
    return [line.rstrip("\n") for line in lines if line.strip()]


def _parquet_values(data: bytes, keys: str, column: str) -> list[str]:
    import pyarrow as pa

    from clip_batch.storage.arrow import ParquetFile

    file = ParquetFile(io.BytesIO(data))
    _check_column(column, file.schema.names, keys)
    values = file.read([column])[column].drop_null()
    kind: Any = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise ConfigError(f"--keys {keys}: column {column!r} is {kind}: give text or whole numbers")
    return [str(value) for value in values.to_pylist()]


def _check_column(column: str, names: list[str], keys: str) -> None:
    if column not in names:
        raise ConfigError(f"--keys {keys} has no column {column!r}: there are {', '.join(names)}")


def drop(store: Store, version: str) -> None:
    """Delete a version's folder; one that is not finished too, which no merge may be building.

    ConfigError: there is no such version, it is live, or another one needs its files, or may: of one that
    is not finished that is not known. CorruptError: a manifest is
    not readable.
    """
    folders = _folders(store)
    if version not in folders:
        raise ConfigError(f"{store.url} has no version {version!r}; there are {', '.join(folders) or 'none'}")
    if current_version(store) == version:
        raise ConfigError(f"{store.display(version)} is live: use another version first")
    name = VersionPaths(version).manifest
    text = store.read(name) if store.exists(name) else None
    if text is not None:
        _refuse_base(store, version, [other for other in folders if other != version])
        store.remove(name)
        if current_version(store) == version:  # `use` came between
            store.create(name, text)
            raise ConfigError(f"{store.display(version)} has become live meanwhile: use another version first")
    store.remove_folder(version)


def _refuse_base(store: Store, version: str, others: list[str]) -> None:
    for other in others:
        where = store.display(other)
        if not store.exists(VersionPaths(other).manifest):
            raise ConfigError(f"{where} is not finished and may be based on {version}: finish it, or drop it first")
        manifest = load_manifest(store, other)
        if version in {manifest.template, *(name.split("/")[0] for name in manifest.files)}:
            raise ConfigError(f"{where} has index shards, or the template, of {version}: drop it first, or keep both")
