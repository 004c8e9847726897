"""Search an index version in Milvus and SQL.

INDEX still says which version is live, which encoder made it, and which rows were removed: its CURRENT, manifest and
removal lists are read, but no faiss index and no Arrow file.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from shlex import quote
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clip_batch.config import DatabaseConfig, SearchConfig, StorageConfig
from clip_batch.errors import ConfigError, DatabaseError
from clip_batch.export.databases import check_identity, identity, table_name
from clip_batch.export.databases.columns import schema_of
from clip_batch.export.databases.milvus import MOST, Milvus
from clip_batch.export.databases.sql import IDS_PER_STATEMENT, Sql, SqlTable
from clip_batch.index import removed_rows
from clip_batch.index.ann.order import best
from clip_batch.index.manifest import load_manifest
from clip_batch.search.checks import check_columns, check_modality, checked_ids, checked_search
from clip_batch.search.conditions import And, Compare, Condition, In, columns_in
from clip_batch.search.encoder import load_encoder
from clip_batch.search.evaluate import Check, Evaluator, unchecked
from clip_batch.search.rows import Ids, RowSet, Vectors, selection
from clip_batch.storage.store import Store

if TYPE_CHECKING:
    from clip_batch.encoders import Model

SURPLUS = 1_000
"""Largest number of removed rows that the databases may still hold.

Each search requests as many hits more than `k` as there are such rows, and drops the removed ones.
"""


class DatabaseBackend:
    """A `Backend` over the collection and the table of INDEX's live version.

    The constructor raises what `load_manifest` raises, and DatabaseError if a database does not exist, holds another
    version or another encoder's vectors, or lacks rows.
    """

    def __init__(
        self,
        index: str,
        databases: DatabaseConfig,
        storage: StorageConfig = StorageConfig(),
        config: SearchConfig = SearchConfig(),
    ) -> None:
        store = Store(index, storage.storage_options)
        manifest = load_manifest(store)
        self.storage, self._config = storage, config
        # What merge measured and tuned is of faiss's index, not of Milvus's.
        self.manifest = replace(manifest, recall={}, effort=dict.fromkeys(manifest.effort), efforts={})
        removed = removed_rows.removed_if_known(store, manifest)
        if removed is None:
            raise DatabaseError(
                f"{store.url}: the rows of a removal are not known yet: run clip-batch export sql again"
            )
        self._removed = removed
        self._encoder: Model | None = None
        self._loading = Lock()
        name, expected = table_name(databases.table_prefix, manifest.version), identity(manifest)
        with ExitStack() as stack:
            milvus = stack.enter_context(Milvus(databases.milvus, databases.milvus_token))
            sql = stack.enter_context(Sql(databases.sql, databases.table_prefix))
            about, record = milvus.about(name), sql.record(name)
            if about is None:
                raise DatabaseError(
                    f"{milvus} has no collection {name}: run clip-batch export milvus --index {quote(store.url)}"
                )
            if record is None:
                raise DatabaseError(f"{sql} has no table {name}: run clip-batch export sql --index {quote(store.url)}")
            check_identity(f"collection {name} of {milvus}", about, expected)
            check_identity(f"table {name} of {sql}", vars(record), expected)
            self._vectors, self._table = milvus.open(name, list(manifest.key), about["index"]), sql.open(name, record)
            self._surplus = self._check(self._vectors.count(0, manifest.rows), "milvus", str(self._vectors))
            self._check(self._table.count(0, manifest.rows), "sql", str(self._table))
            self._open = stack.pop_all()
        self.schema = schema_of(record.columns)
        self.most = MOST - self._surplus

    def _check(self, count: int, kind: str, where: str) -> int:
        """Return how many removed rows a database still holds. DatabaseError: it lacks rows, or holds too many."""
        rows = self.manifest.rows - len(self._removed)
        again = f"run clip-batch export {kind} again"
        if count < rows:
            raise DatabaseError(f"{where} has {count:,} of {rows:,} rows: {again}")
        if count > rows + SURPLUS:
            raise DatabaseError(f"{where} has {count - rows:,} rows that were removed from the index: {again}")
        return count - rows

    def shortened(self) -> str:
        return ""

    def close(self) -> None:
        self._open.close()

    @property
    def encoder(self) -> Model:
        with self._loading:
            if self._encoder is None:
                self._encoder = load_encoder(self.manifest.encoder, self._config, self.storage)
            return self._encoder

    def search_ids(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        modality: str = "image",
        effort: int | None = None,
        among: RowSet | None = None,
        kind: str | None = None,
    ) -> tuple[Vectors, Ids]:
        """Search as `Searcher.search_ids` does, of whatever kind the queries are.

        `effort` is nprobe or ef; None uses Milvus's default.
        """
        vectors = checked_search(self.manifest, queries, k, modality, effort)
        k = min(int(k), self.manifest.rows)
        if k > self.most:
            raise ConfigError(f"k is {k}: Milvus gives {self.most} at the most")
        if among is not None and not among.count:
            return best(np.empty((len(vectors), 0), np.float32), np.empty((len(vectors), 0), np.int64), k)
        depth = min(k + self._surplus, self.manifest.rows)
        scores, ids = self._vectors.search(vectors, depth, modality, effort, among.ids if among else None)
        removed = removed_rows.contains(self._removed, ids)
        return best(np.where(removed, -np.inf, scores), np.where(removed, -1, ids), k)

    def where(self, condition: Condition, check: Check = unchecked) -> RowSet:
        """Return the rows for which a condition is true, without those that were removed.

        SQL evaluates the parts of the condition that it evaluates exactly as we do. The values of the remaining rows
        are read, and the whole condition is evaluated here. `check` is called for each block of rows, and may raise.
        """
        names = columns_in(condition)
        check_columns(self.schema, names)
        schema = pa.schema([self.schema.field(name) for name in names])
        evaluator, matching = Evaluator(condition, check), [np.empty(0, dtype=np.int64)]
        for ids, rows in self._table.scan(names, _sql_conditions(self._table, condition)):
            columns = zip(zip(*rows, strict=True), schema.types, strict=True)
            batch = pa.RecordBatch.from_arrays([pa.array(values, kind) for values, kind in columns], schema=schema)
            matching.append(ids[evaluator.matches(batch)])
        return self.select(np.concatenate(matching))

    def select(self, ids: npt.ArrayLike) -> RowSet:
        return selection(self.manifest, self._removed, ids)

    def metadata(self, ids: npt.ArrayLike, columns: list[str] | None = None) -> list[dict[str, Any]]:
        row_ids = checked_ids(self.manifest, self._removed, ids)
        names = list(self.schema.names) if columns is None else columns
        check_columns(self.schema, names)
        values = self._table.select(np.unique(row_ids), names)
        if missing := [id for id in row_ids.tolist() if id not in values]:
            raise DatabaseError(f"{self._table} has no row {missing[0]}: run clip-batch export sql again")
        return [dict(zip(names, values[id], strict=True)) for id in row_ids.tolist()]

    def table(self, ids: npt.ArrayLike, columns: list[str] | None = None) -> pa.Table:
        rows = self.metadata(ids, columns)
        names = self.schema.names if columns is None else columns
        return pa.Table.from_pylist(rows, pa.schema([self.schema.field(name) for name in names]))

    def reconstruct(self, ids: npt.ArrayLike, modality: str = "image") -> Vectors:
        row_ids = checked_ids(self.manifest, self._removed, ids)
        check_modality(self.manifest, modality)
        return self._vectors.vectors(row_ids, modality)


def _sql_conditions(table: SqlTable, condition: Condition) -> list[Any]:
    """Return SQL conditions that every matching row meets; none if SQL cannot evaluate any part exactly."""
    if isinstance(condition, And):
        return [clause for part in condition.parts for clause in _sql_conditions(table, part)]
    if not isinstance(condition, Compare | In):
        return []
    kind = table.kind(condition.column)
    values = [
        _sql_value(value, kind) for value in (condition.values if isinstance(condition, In) else [condition.value])
    ]
    if None in values or len(values) > IDS_PER_STATEMENT:
        return []
    if isinstance(condition, In) or condition.operator == "=":
        return [table.among(condition.column, values)]
    if kind not in ("int64", "double") or condition.operator == "!=":
        return []
    low, high = (values[0], None) if condition.operator[0] == ">" else (None, values[0])
    return table.between(condition.column, low, high)


def _sql_value(value: Any, kind: str) -> Any:
    """Return the value with which SQL compares a column of a kind exactly; None if only Python can compare it."""
    if isinstance(value, bool) or kind == "bool":
        return value if isinstance(value, bool) and kind == "bool" else None
    if isinstance(value, str):
        return value if kind == "string" and "\0" not in value else None
    if kind == "string" or abs(value) >= 2**53 or (kind == "int64" and value != int(value)):
        return None
    return float(value) if kind == "double" else int(value)
