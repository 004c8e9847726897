"""Filling a database with an index version, block by block of ids; going on after a kill; proving what is there.

A block is counted first. If it has as many rows as it should it is left alone; else what it lacks is written and
what it should not have is deleted. So running an export again is how it goes on, and what mends it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from clip_batch.config import DatabaseConfig, StorageConfig
from clip_batch.errors import ConfigError, DatabaseError
from clip_batch.export.databases import check_identity, identity, table_name
from clip_batch.export.databases.columns import columns_of
from clip_batch.export.databases.milvus import Collection, Milvus
from clip_batch.export.databases.rows import Ids, IndexRows, VectorRows
from clip_batch.export.databases.sql import ExportRecord, Sql, SqlTable
from clip_batch.search.searcher import Searcher

SAMPLE = 1_000
"""Rows that are compared value by value where not all are."""

EXAMPLES = 5
"""Ids that a report names of each kind."""

Progress = Callable[[str], None]


class Target(Protocol):
    """What can be filled: rows by id."""

    def count(self, start: int, stop: int) -> int:
        """How many rows have an id in [start, stop)."""

    def ids(self, start: int, stop: int) -> Ids:
        """Those ids, sorted."""

    def write(self, ids: Ids) -> None:
        """Write rows (n,) that are not there."""

    def delete(self, ids: Ids) -> None:
        """Delete those of the rows (n,) that are there."""

    def differ(self, ids: Ids) -> Ids:
        """Which of the rows (n,) are there with other values than they should have."""

    def finish(self) -> None:
        """All is written."""


@dataclass(frozen=True)
class Checked:
    """What a database has of the `rows` it should have: `there` so many, of which `compared` were read and compared.

    `missing`, `surplus` and `different` count rows; `examples` has ids of each.
    """

    where: str
    rows: int
    there: int
    compared: int
    missing: int
    surplus: int
    different: int
    examples: dict[str, list[int]]

    @property
    def ok(self) -> bool:
        return not (self.missing or self.surplus or self.different)


def describe(found: Checked) -> str:
    """One line for people."""
    wrong = [
        f"{getattr(found, what):,} {what}" + (f" ({', '.join(map(str, ids))})" if ids else "")
        for what, ids in found.examples.items()
        if getattr(found, what)
    ]
    text = f"{found.there:,} of {found.rows:,} rows in {found.where}, {found.compared:,} compared"
    return f"{text}: {'; '.join(wrong) or 'all as in the index'}"


def export_sql(
    index: str,
    config: DatabaseConfig,
    storage: StorageConfig = StorageConfig(),
    verify: bool = False,
    deep: bool = False,
    progress: Progress = lambda line: None,
) -> Checked:
    """Fill a table with the metadata of INDEX's live version, or with `verify` only look; then check it.

    All rows are counted, SAMPLE or, if `deep`, all of them compared. Errors: as `Searcher` and `Sql`; DatabaseError
    where the table holds something else.
    """
    if not config.sql:
        raise ConfigError("export sql needs --sql: a URL such as postgresql://user@host/database, or a file for SQLite")
    with Searcher(index, storage) as searcher, Sql(config.sql, config.table_prefix, not verify) as sql:
        rows, name = IndexRows(searcher), table_name(config.table_prefix, searcher.manifest.version)
        known = identity(searcher.manifest)
        record = sql.record(name)
        if record is None:
            _refuse_absent(verify, f"table {name}", sql)
            record = ExportRecord(**known, rows=searcher.manifest.rows, done=0, columns=columns_of(searcher.schema))
            sql.create(name, record)
        check_identity(f"table {name} of {sql}", vars(record), known)
        return _run(rows, _Metadata(sql.open(name, record), rows), verify, deep, progress)


def export_milvus(
    index: str,
    config: DatabaseConfig,
    storage: StorageConfig = StorageConfig(),
    verify: bool = False,
    deep: bool = False,
    progress: Progress = lambda line: None,
) -> Checked:
    """Fill a collection with the vectors of INDEX's live version, or with `verify` only look; then check it.

    As `export_sql`.
    """
    if not config.milvus:
        raise ConfigError(
            "export milvus needs --milvus: a server's http://host:port, or a file FILE.db for milvus-lite"
        )
    with Searcher(index, storage) as searcher, Milvus(config.milvus, config.milvus_token, not verify) as milvus:
        rows, manifest = VectorRows(searcher), searcher.manifest
        name, modalities = table_name(config.table_prefix, manifest.version), list(manifest.key)
        known = {**identity(manifest), "vectors": "exact" if rows.exact else "inexact"}
        about = milvus.about(name)
        progress(f"vectors are {rows.origin}")
        if about is None:
            _refuse_absent(verify, f"collection {name}", milvus)
            about = {**known, "index": config.milvus_index}
            milvus.create(name, manifest.dim, modalities, manifest.rows, about)
        check_identity(f"collection {name} of {milvus}", about, known)
        return _run(rows, _Vectors(milvus.open(name, modalities, about["index"]), rows), verify, deep, progress)


def _refuse_absent(verify: bool, what: str, where: object) -> None:
    if verify:
        raise DatabaseError(f"{what} is not in {where}: export without --verify first")


def _run(rows: IndexRows, target: Target, verify: bool, deep: bool, progress: Progress) -> Checked:
    if not verify:
        _fill(rows, target, progress)
    return _check(rows, target, deep)


def _fill(rows: IndexRows, target: Target, progress: Progress) -> None:
    """Write what is missing, delete what was removed."""
    written = 0
    for start, stop in rows.blocks():
        wanted = rows.ids(start, stop)
        if target.count(start, stop) == len(wanted) and not len(rows.removed(start, stop)):
            continue
        there = target.ids(start, stop)
        if len(surplus := np.setdiff1d(there, wanted)):
            target.delete(surplus)
            progress(f"{len(surplus):,} rows deleted, which were removed from the index")
        if len(missing := np.setdiff1d(wanted, there)):
            target.write(missing)
            written += len(missing)
            progress(f"{stop:,} of {rows.manifest.rows:,} rows")
    target.finish()
    progress(f"{written:,} rows written")


def _check(rows: IndexRows, target: Target, deep: bool) -> Checked:
    sample = np.random.default_rng().choice(rows.manifest.rows, min(SAMPLE, rows.manifest.rows), replace=False)
    found: dict[str, list[Ids]] = {"missing": [], "surplus": [], "different": []}
    there = compared = 0
    for start, stop in rows.blocks():
        wanted = rows.ids(start, stop)
        chosen = wanted if deep else np.intersect1d(wanted, sample)
        there += (count := target.count(start, stop))
        if count != len(wanted):
            ids = target.ids(start, stop)
            found["missing"].append(np.setdiff1d(wanted, ids))
            found["surplus"].append(np.setdiff1d(ids, wanted))
            chosen = np.intersect1d(chosen, ids)
        if len(chosen):
            compared += len(chosen)
            found["different"].append(target.differ(chosen))
    lists = {what: np.concatenate([np.empty(0, dtype=np.int64), *ids]) for what, ids in found.items()}
    beyond = target.count(rows.manifest.rows, 2**62) + target.count(-(2**62), 0)
    counts = {what: len(ids) for what, ids in lists.items()}
    counts["surplus"] += beyond
    examples = {what: ids[:EXAMPLES].tolist() for what, ids in lists.items()}
    return Checked(str(target), len(rows), there + beyond, compared, **counts, examples=examples)


class _Metadata:
    """A table, filled with metadata."""

    def __init__(self, table: SqlTable, rows: IndexRows) -> None:
        self._table, self._rows = table, rows
        self.count, self.ids, self.delete, self.finish = table.count, table.ids, table.delete, table.finish

    def __str__(self) -> str:
        return str(self._table)

    def write(self, ids: Ids) -> None:
        self._table.add(ids, self._rows.table(ids))

    def differ(self, ids: Ids) -> Ids:
        return self._table.differ(ids, self._rows.table(ids))


class _Vectors:
    """A collection, filled with vectors."""

    def __init__(self, collection: Collection, rows: VectorRows) -> None:
        self._collection, self._rows = collection, rows
        self.count, self.ids = collection.count, collection.ids
        self.delete, self.finish = collection.delete, collection.finish

    def __str__(self) -> str:
        return str(self._collection)

    def write(self, ids: Ids) -> None:
        self._collection.add(ids, self._rows.vectors(ids))

    def differ(self, ids: Ids) -> Ids:
        return self._collection.differ(ids, self._rows.vectors(ids))
