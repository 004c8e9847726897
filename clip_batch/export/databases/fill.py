"""Export an index version to a database, block by block of ids, and check what the database holds.

Each block is counted first. If it has the right number of rows, it is left as it is; otherwise missing rows are written
and surplus rows deleted. Running an export again therefore resumes it after a kill, and repairs it.
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
from clip_batch.types import counted

SAMPLE = 1_000
"""Rows that a check compares value by value, unless it is deep."""

EXAMPLES = 5
"""Ids that a report names for each kind of difference."""

Progress = Callable[[str], None]


class Target(Protocol):
    """A table or collection that an export fills: rows by id."""

    def count(self, start: int, stop: int) -> int:
        """Return the number of rows whose id is in [start, stop)."""

    def ids(self, start: int, stop: int) -> Ids:
        """Return the sorted ids in [start, stop) that have a row."""

    def write(self, ids: Ids) -> None:
        """Write the rows of ids (n,), none of which exists."""

    def delete(self, ids: Ids) -> None:
        """Delete the rows of ids (n,) that exist."""

    def differ(self, ids: Ids) -> Ids:
        """Return those of ids (n,) whose rows exist with other values than the index has."""

    def finish(self) -> None:
        """Record that all rows were written."""


@dataclass(frozen=True)
class ExportCheck:
    """How the rows of a table or collection agree with the index.

    It should have `rows` rows and has `there` rows, of which the values of `compared` were compared. `missing`,
    `surplus` and `different` count rows, and `examples` has up to EXAMPLES ids of each.
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


def describe(check: ExportCheck) -> str:
    """Return one line that says what agrees and what differs."""
    differences = [
        f"{getattr(check, what):,} {what}" + (f" ({', '.join(map(str, ids))})" if ids else "")
        for what, ids in check.examples.items()
        if getattr(check, what)
    ]
    text = f"{check.there:,} of {check.rows:,} rows in {check.where}, {check.compared:,} compared"
    return f"{text}: {'; '.join(differences) or 'all as in the index'}"


def export_sql(
    index: str,
    config: DatabaseConfig,
    storage: StorageConfig = StorageConfig(),
    verify: bool = False,
    deep: bool = False,
    progress: Progress = lambda line: None,
) -> ExportCheck:
    """Write the metadata of INDEX's live version to an SQL table, unless `verify`; then check the table.

    The check counts all rows and compares the values of SAMPLE rows, or of all rows if `deep`. Errors: those of
    `Searcher` and `Sql`, and DatabaseError if the table holds another version.
    """
    if not config.sql:
        raise ConfigError("export sql needs --sql: a URL such as postgresql://user@host/database, or a file for SQLite")
    with Searcher(index, storage) as searcher, Sql(config.sql, config.table_prefix, not verify) as sql:
        rows, name = IndexRows(searcher), table_name(config.table_prefix, searcher.manifest.version)
        expected = identity(searcher.manifest)
        record = sql.record(name)
        if record is None:
            _refuse_absent(verify, f"table {name}", sql)
            record = ExportRecord(**expected, rows=searcher.manifest.rows, done=0, columns=columns_of(searcher.schema))
            sql.create(name, record)
        check_identity(f"table {name} of {sql}", vars(record), expected)
        return _run(rows, _Metadata(sql.open(name, record), rows), verify, deep, progress)


def export_milvus(
    index: str,
    config: DatabaseConfig,
    storage: StorageConfig = StorageConfig(),
    verify: bool = False,
    deep: bool = False,
    progress: Progress = lambda line: None,
) -> ExportCheck:
    """Write the vectors of INDEX's live version to a Milvus collection, unless `verify`; then check the collection.

    The check and the errors are those of `export_sql`, with `Milvus` in place of `Sql`.
    """
    if not config.milvus:
        raise ConfigError(
            "export milvus needs --milvus: a server's http://host:port, or a file FILE.db for milvus-lite"
        )
    with Searcher(index, storage) as searcher, Milvus(config.milvus, config.milvus_token, not verify) as milvus:
        rows, manifest = VectorRows(searcher), searcher.manifest
        name, modalities = table_name(config.table_prefix, manifest.version), list(manifest.key)
        expected = {**identity(manifest), "vectors": "exact" if rows.exact else "inexact"}
        about = milvus.about(name)
        progress(f"vectors are {rows.origin}")
        if about is None:
            _refuse_absent(verify, f"collection {name}", milvus)
            about = {**expected, "index": config.milvus_index}
            milvus.create(name, manifest.dim, modalities, manifest.rows, about)
        check_identity(f"collection {name} of {milvus}", about, expected)
        return _run(rows, _Vectors(milvus.open(name, modalities, about["index"]), rows), verify, deep, progress)


def _refuse_absent(verify: bool, what: str, where: object) -> None:
    if verify:
        raise DatabaseError(f"{what} is not in {where}: export without --verify first")


def _run(rows: IndexRows, target: Target, verify: bool, deep: bool, progress: Progress) -> ExportCheck:
    if not verify:
        _fill(rows, target, progress)
    return _check(rows, target, deep)


def _fill(rows: IndexRows, target: Target, progress: Progress) -> None:
    """Write the rows that the target lacks, and delete those that were removed from the index."""
    written = 0
    for start, stop in rows.blocks():
        expected = rows.ids(start, stop)
        if target.count(start, stop) == len(expected) and not len(rows.removed(start, stop)):
            continue
        present = target.ids(start, stop)
        if len(surplus := np.setdiff1d(present, expected)):
            target.delete(surplus)
            progress(f"{len(surplus):,} rows deleted, which were removed from the index")
        if len(missing := np.setdiff1d(expected, present)):
            target.write(missing)
            written += len(missing)
            progress(f"{stop:,} of {rows.manifest.rows:,} rows are in the database")
    target.finish()
    progress(f"{counted(written, 'row')} written; then what the database holds is compared with the index")


def _check(rows: IndexRows, target: Target, deep: bool) -> ExportCheck:
    sample = np.random.default_rng().choice(rows.manifest.rows, min(SAMPLE, rows.manifest.rows), replace=False)
    differing: dict[str, list[Ids]] = {"missing": [], "surplus": [], "different": []}
    present = compared = 0
    for start, stop in rows.blocks():
        expected = rows.ids(start, stop)
        chosen = expected if deep else np.intersect1d(expected, sample)
        present += (count := target.count(start, stop))
        if count != len(expected):
            ids = target.ids(start, stop)
            differing["missing"].append(np.setdiff1d(expected, ids))
            differing["surplus"].append(np.setdiff1d(ids, expected))
            chosen = np.intersect1d(chosen, ids)
        if len(chosen):
            compared += len(chosen)
            differing["different"].append(target.differ(chosen))
    lists = {what: np.concatenate([np.empty(0, dtype=np.int64), *ids]) for what, ids in differing.items()}
    beyond = target.count(rows.manifest.rows, 2**62) + target.count(-(2**62), 0)
    counts = {what: len(ids) for what, ids in lists.items()}
    counts["surplus"] += beyond
    examples = {what: ids[:EXAMPLES].tolist() for what, ids in lists.items()}
    return ExportCheck(str(target), len(rows), present + beyond, compared, **counts, examples=examples)


class _Metadata:
    """An SQL table as the target of an export of metadata."""

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
    """A Milvus collection as the target of an export of vectors."""

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
