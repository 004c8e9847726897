"""One table of metadata in SQL: SQLite, MySQL and MariaDB, PostgreSQL, through SQLAlchemy.

    <prefix>_<version>   id (the index's row), then a column for each of the metadata
    <prefix>_exports     a row for each such table: what it holds, and up to which id it was filled

Rows and the record of them are written in one transaction. Messages carry the URL without password and query.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clip_batch.errors import ConfigError, DatabaseError, one_line
from clip_batch.export.databases.columns import Column, values

if TYPE_CHECKING:
    import sqlalchemy as sa

Ids = npt.NDArray[np.int64]

DRIVERS = {"sqlite": "pysqlite", "mysql": "pymysql", "mariadb": "pymysql", "postgresql": "psycopg"}

ASKED = 500
"""Ids named in one statement: older SQLite takes 999 parameters, and long lists of them parse slowly."""

SCANNED = 10_000
"""Rows that are read at once."""

WRITTEN = 2_000
"""Rows of one transaction."""


@dataclass(frozen=True)
class ExportRecord:
    """What `<prefix>_exports` says of a table; every row with an id below `done` was written."""

    version: str
    manifest: str
    encoder: str
    rows: int
    done: int
    columns: tuple[Column, ...]


class Sql:
    """A database that holds exported tables; a context manager.

    `url` is SQLAlchemy's, or the path of an SQLite file, which is created if `create`. ConfigError: the URL is not
    understood or of another kind of database. DatabaseError: it cannot be reached, or refuses.
    """

    def __init__(self, url: str, prefix: str, create: bool = False) -> None:
        import sqlalchemy as sa

        made = _parse(url)
        self.where = sa.URL.create(made.drivername, made.username, None, made.host, made.port, made.database)
        self._secrets = [text for text in (made.password, *map(str, made.query.values())) if text]
        self.kind = made.get_backend_name()
        there = made.database and os.path.exists(made.database)
        if self.kind == "sqlite" and not there and not create:
            raise DatabaseError(f"{self} is not there: run clip-batch export sql first")
        settings = {"sql_mode": "STRICT_ALL_TABLES"} if self.kind in ("mysql", "mariadb") else {}
        self.engine = sa.create_engine(made, connect_args=settings, hide_parameters=True, pool_pre_ping=True)
        self._meta = sa.MetaData()
        self._exports = sa.Table(
            f"{prefix}_exports",
            self._meta,
            sa.Column("name", sa.String(100), primary_key=True),
            *(sa.Column(name, sa.String(64), nullable=False) for name in ("version", "manifest", "encoder")),
            *(sa.Column(name, sa.BigInteger, nullable=False) for name in ("rows", "done")),
            sa.Column("columns", self._long(), nullable=False),
            **_UTF8,
        )

    def __str__(self) -> str:
        return self.where.render_as_string(hide_password=True)

    def __enter__(self) -> Sql:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.dispose()

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """What the database refuses within the block is a DatabaseError of one line."""
        import sqlalchemy as sa

        try:
            yield
        except sa.exc.SQLAlchemyError as error:
            said = one_line(getattr(error, "orig", None) or error, 500)
            for secret in self._secrets:
                said = said.replace(secret, "...")
            raise DatabaseError(f"{self}: {said}") from None

    def record(self, name: str) -> ExportRecord | None:
        """What is recorded of a table; None where there is no such export."""
        import sqlalchemy as sa

        with self.asked(), self.engine.connect() as connection:
            if not sa.inspect(connection).has_table(self._exports.name):
                return None
            chosen = sa.select(self._exports).where(self._exports.c.name == name)
            row = connection.execute(chosen).mappings().one_or_none()
        if row is None:
            return None
        columns = tuple(Column(**column) for column in json.loads(row["columns"]))
        return ExportRecord(row["version"], row["manifest"], row["encoder"], row["rows"], row["done"], columns)

    def create(self, name: str, record: ExportRecord) -> None:
        """Create a table without rows, and its record. DatabaseError: there is such a table, without a record."""
        import sqlalchemy as sa

        table = self._table(name, record.columns)
        with self.asked(), self.engine.begin() as connection:
            if sa.inspect(connection).has_table(name):
                if connection.execute(sa.select(table.c.id).limit(1)).first() is not None:
                    raise DatabaseError(f"{self}: table {name} has no record of its export: drop it and export again")
                table.drop(connection)  # creating it was cut off
            self._meta.create_all(connection, [table, self._exports])
            columns = json.dumps([asdict(column) for column in record.columns])
            connection.execute(self._exports.insert(), {**asdict(record), "name": name, "columns": columns})

    def open(self, name: str, record: ExportRecord) -> SqlTable:
        """The table of a record."""
        return SqlTable(self, self._table(name, record.columns), self._exports, record)

    def _table(self, name: str, columns: Sequence[Column]) -> sa.Table:
        import sqlalchemy as sa

        kinds = {"string": self._long(), "int64": sa.BigInteger(), "double": sa.Double(), "bool": sa.Boolean()}
        own = [sa.Column(one.sql, kinds[one.kind], key=f"c{at}", quote=True) for at, one in enumerate(columns)]
        id = sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=False
        )
        return sa.Table(name, self._meta, id, *own, extend_existing=True, **_UTF8)

    def _long(self) -> Any:
        import sqlalchemy as sa
        from sqlalchemy.dialects import mysql

        return sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


_UTF8: dict[str, Any] = {
    f"{dialect}_{name}": value
    for dialect in ("mysql", "mariadb")
    for name, value in {"charset": "utf8mb4", "collate": "utf8mb4_bin", "engine": "InnoDB"}.items()
}
"""All of Unicode, and texts equal only where their bytes are."""


class SqlTable:
    """The rows of one export. DatabaseError: as `Sql`; each call is one transaction."""

    def __init__(self, sql: Sql, table: sa.Table, exports: sa.Table, record: ExportRecord) -> None:
        self.sql, self.record, self._table, self._exports = sql, record, table, exports
        self._done = record.done

    def __str__(self) -> str:
        return f"table {self._table.name} of {self.sql}"

    def count(self, start: int, stop: int) -> int:
        """How many rows have an id in [start, stop)."""
        import sqlalchemy as sa

        id = self._table.c.id
        return int(self._all(sa.select(sa.func.count()).where(id >= start, id < stop))[0][0])

    def ids(self, start: int, stop: int) -> Ids:
        """Those ids, sorted."""
        import sqlalchemy as sa

        id = self._table.c.id
        rows = self._all(sa.select(id).where(id >= start, id < stop).order_by(id))
        return np.array([row[0] for row in rows], dtype=np.int64)

    def add(self, ids: Ids, metadata: pa.Table) -> None:
        """Insert rows (n,), none of which is there, some thousand a transaction, each with the record of it."""
        columns = self._values(metadata)
        for start in range(0, len(ids), WRITTEN):
            part = slice(start, start + WRITTEN)
            rows = zip(ids[part].tolist(), *(column[part] for column in columns), strict=True)
            names = self._table.c.keys()
            self._write([dict(zip(names, row, strict=True)) for row in rows], int(ids[part][-1]) + 1)

    def _write(self, rows: list[dict[str, Any]], stop: int) -> None:
        done = max(self._done, stop)
        with self.sql.asked(), self.sql.engine.begin() as connection:
            self._mark(connection, done)
            connection.execute(self._table.insert(), rows)
        self._done = done

    def _mark(self, connection: sa.Connection, done: int) -> None:
        """Record how far it is; the record's own row keeps two exports of one table apart."""
        named = (self._exports.c.name == self._table.name) & (self._exports.c.done == self._done)
        if connection.execute(self._exports.update().where(named).values(done=done)).rowcount != 1:
            raise DatabaseError(f"{self}: another export is filling it; let it end, then run this again")

    def finish(self) -> None:
        """Record that all rows are there."""
        if self._done != self.record.rows:
            with self.sql.asked(), self.sql.engine.begin() as connection:
                self._mark(connection, self.record.rows)
            self._done = self.record.rows

    def delete(self, ids: Ids) -> None:
        """Delete the rows (n,) that are there."""
        with self.sql.asked(), self.sql.engine.begin() as connection:
            for start in range(0, len(ids), ASKED):
                some = ids[start : start + ASKED].tolist()
                connection.execute(self._table.delete().where(self._table.c.id.in_(some)))

    def differ(self, ids: Ids, metadata: pa.Table) -> Ids:
        """Which of the rows (n,) are there with other values than these."""
        wanted = dict(zip(ids.tolist(), zip(*self._values(metadata), strict=True), strict=True))
        found = self.select(ids, [column.name for column in self.record.columns])
        return np.array([id for id, row in found.items() if tuple(row) != wanted[id]], dtype=np.int64)

    def _values(self, metadata: pa.Table) -> list[list[Any]]:
        return values(metadata, self.record.columns, nul=self.sql.kind != "postgresql")

    def select(self, ids: Ids, names: Sequence[str]) -> dict[int, Sequence[Any]]:
        """id -> values of these metadata columns, of the rows that are there."""
        import sqlalchemy as sa

        chosen = sa.select(self._table.c.id, *(self._column(name) for name in names))
        found: dict[int, Sequence[Any]] = {}
        for start in range(0, len(ids), ASKED):
            some = ids[start : start + ASKED].tolist()
            found |= {row[0]: row[1:] for row in self._all(chosen.where(self._table.c.id.in_(some)))}
        return found

    def scan(self, names: Sequence[str], conditions: Sequence[Any]) -> Iterator[tuple[Ids, list[Sequence[Any]]]]:
        """Ids (n,) and values in these columns of the rows that meet SQL conditions, by the thousand, in any order."""
        import sqlalchemy as sa

        chosen = sa.select(self._table.c.id, *(self._column(name) for name in names)).where(*conditions)
        with self.sql.asked(), self.sql.engine.connect() as connection:
            answer = connection.execute(chosen, execution_options={"yield_per": SCANNED})
            for rows in answer.partitions(SCANNED):
                yield np.array([row[0] for row in rows], dtype=np.int64), [row[1:] for row in rows]

    def among(self, name: str, values: Sequence[Any]) -> Any:
        """The SQL condition that a metadata column has one of these values."""
        return self._column(name).in_(values)

    def between(self, name: str, low: Any, high: Any) -> list[Any]:
        """The SQL conditions that a metadata column is within bounds; None is none."""
        column = self._column(name)
        bounds = (None if low is None else column >= low, None if high is None else column <= high)
        return [bound for bound in bounds if bound is not None]

    def kind(self, name: str) -> str:
        """What the values of a metadata column are."""
        return next(column.kind for column in self.record.columns if column.name == name)

    def _column(self, name: str) -> Any:
        at = next(at for at, column in enumerate(self.record.columns) if column.name == name)
        return self._table.c[f"c{at}"]

    def _all(self, statement: Any) -> Sequence[Any]:
        with self.sql.asked(), self.sql.engine.connect() as connection:
            return connection.execute(statement).all()


def _parse(url: str) -> sa.URL:
    import sqlalchemy as sa

    try:
        made = sa.engine.make_url(url if "://" in url else f"sqlite:///{url}")
        name, _, driver = made.drivername.partition("+")
    except (sa.exc.ArgumentError, ValueError):
        raise ConfigError("--sql is not understood: write kind://user:password@host:port/database") from None
    if name not in DRIVERS:
        raise ConfigError(f"--sql of kind {name} is not served: there are {', '.join(DRIVERS)}")
    return made if driver else made.set(drivername=f"{name}+{DRIVERS[name]}")
