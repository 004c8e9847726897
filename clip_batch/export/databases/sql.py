"""Tables of metadata in SQLite, MySQL, MariaDB or PostgreSQL, through SQLAlchemy.

    <prefix>_<version>   id (the index's row), then one column for each metadata column
    <prefix>_exports     one row for each such table: what it holds, and up to which id it is filled

Rows and their record are written in one transaction. Messages show the URL without its password and query.
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

FILES = (".sqlite", ".sqlite3", ".db")
"""Extensions of SQLite files that are created by their path alone."""

DRIVERS = {"sqlite": "pysqlite", "mysql": "pymysql", "mariadb": "pymysql", "postgresql": "psycopg"}

IDS_PER_STATEMENT = 500
"""Ids in one statement. Older versions of SQLite accept 999 parameters, and long lists are slow to parse."""

SCAN_ROWS = 10_000
"""Rows that a scan reads at a time."""

TRANSACTION_ROWS = 2_000
"""Rows that one transaction inserts."""


@dataclass(frozen=True)
class ExportRecord:
    """The row of `<prefix>_exports` for one table. Every row with an id below `done` was written."""

    version: str
    manifest: str
    encoder: str
    rows: int
    done: int
    columns: tuple[Column, ...]


class Sql:
    """A database that holds exported tables, which is a context manager.

    `url` is a URL of SQLAlchemy, or the path of an SQLite file, which is created if `create` is true. ConfigError: the
    URL cannot be parsed, or names another kind of database. DatabaseError: the database cannot be reached, or fails.
    """

    def __init__(self, url: str, prefix: str, create: bool = False) -> None:
        import sqlalchemy as sa

        parsed = _parse(url)
        self.where = sa.URL.create(parsed.drivername, parsed.username, None, parsed.host, parsed.port, parsed.database)
        self._secrets = [text for text in (parsed.password, *map(str, parsed.query.values())) if text]
        self.kind = parsed.get_backend_name()
        exists = parsed.database and os.path.exists(parsed.database)
        if "://" not in url and not exists and not url.endswith(FILES):
            raise ConfigError(
                f"--sql {url} is neither a URL, such as postgresql://user@host/database, nor a file that exists, nor "
                f"one that ends in {', '.join(FILES)}"
            )
        if self.kind == "sqlite" and not exists and not create:
            raise DatabaseError(f"{self} does not exist: run clip-batch export sql first")
        settings = {"sql_mode": "STRICT_ALL_TABLES"} if self.kind in ("mysql", "mariadb") else {}
        self.engine = sa.create_engine(parsed, connect_args=settings, hide_parameters=True, pool_pre_ping=True)
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
    def database_errors(self) -> Iterator[None]:
        """Raise each error of the database within the block as a DatabaseError of one line, without secrets."""
        import sqlalchemy as sa

        try:
            yield
        except sa.exc.SQLAlchemyError as error:
            message = one_line(getattr(error, "orig", None) or error, 500)
            for secret in self._secrets:
                message = message.replace(secret, "...")
            raise DatabaseError(f"{self}: {message}") from None

    def record(self, name: str) -> ExportRecord | None:
        """Return the record of a table; None if it was not exported."""
        import sqlalchemy as sa

        with self.database_errors(), self.engine.connect() as connection:
            if not sa.inspect(connection).has_table(self._exports.name):
                return None
            query = sa.select(self._exports).where(self._exports.c.name == name)
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            return None
        columns = tuple(Column(**column) for column in json.loads(row["columns"]))
        return ExportRecord(row["version"], row["manifest"], row["encoder"], row["rows"], row["done"], columns)

    def create(self, name: str, record: ExportRecord) -> None:
        """Create an empty table and its record. DatabaseError: the table exists with rows, but has no record."""
        import sqlalchemy as sa

        table = self._table(name, record.columns)
        with self.database_errors(), self.engine.begin() as connection:
            if sa.inspect(connection).has_table(name):
                if connection.execute(sa.select(table.c.id).limit(1)).first() is not None:
                    raise DatabaseError(f"{self}: table {name} has no record of its export: drop it and export again")
                table.drop(connection)  # an export was killed while it created the table
            self._meta.create_all(connection, [table, self._exports])
            columns = json.dumps([asdict(column) for column in record.columns])
            connection.execute(self._exports.insert(), {**asdict(record), "name": name, "columns": columns})

    def open(self, name: str, record: ExportRecord) -> SqlTable:
        """Return the table of a record."""
        return SqlTable(self, self._table(name, record.columns), self._exports, record)

    def _table(self, name: str, columns: Sequence[Column]) -> sa.Table:
        import sqlalchemy as sa

        kinds = {"string": self._long(), "int64": sa.BigInteger(), "double": sa.Double(), "bool": sa.Boolean()}
        metadata = [sa.Column(one.sql, kinds[one.kind], key=f"c{at}", quote=True) for at, one in enumerate(columns)]
        id = sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=False
        )
        return sa.Table(name, self._meta, id, *metadata, extend_existing=True, **_UTF8)

    def _long(self) -> Any:
        import sqlalchemy as sa
        from sqlalchemy.dialects import mysql

        return sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


_UTF8: dict[str, Any] = {
    f"{dialect}_{name}": value
    for dialect in ("mysql", "mariadb")
    for name, value in {"charset": "utf8mb4", "collate": "utf8mb4_bin", "engine": "InnoDB"}.items()
}
"""Table options of MySQL and MariaDB: all of Unicode, and two texts are equal only if their bytes are."""


class SqlTable:
    """The rows of one exported table. All methods raise DatabaseError if the database fails."""

    def __init__(self, sql: Sql, table: sa.Table, exports: sa.Table, record: ExportRecord) -> None:
        self.sql, self.record, self._table, self._exports = sql, record, table, exports
        self._done = record.done

    def __str__(self) -> str:
        return f"table {self._table.name} of {self.sql}"

    def count(self, start: int, stop: int) -> int:
        """Return the number of rows whose id is in [start, stop)."""
        import sqlalchemy as sa

        id = self._table.c.id
        return int(self._all(sa.select(sa.func.count()).where(id >= start, id < stop))[0][0])

    def ids(self, start: int, stop: int) -> Ids:
        """Return the sorted ids in [start, stop) that have a row."""
        import sqlalchemy as sa

        id = self._table.c.id
        rows = self._all(sa.select(id).where(id >= start, id < stop).order_by(id))
        return np.array([row[0] for row in rows], dtype=np.int64)

    def add(self, ids: Ids, metadata: pa.Table) -> None:
        """Insert the rows of ids (n,), none of which exists.

        Each transaction inserts TRANSACTION_ROWS rows and updates the record.
        """
        columns = self._values(metadata)
        for start in range(0, len(ids), TRANSACTION_ROWS):
            part = slice(start, start + TRANSACTION_ROWS)
            rows = zip(ids[part].tolist(), *(column[part] for column in columns), strict=True)
            names = self._table.c.keys()
            self._write([dict(zip(names, row, strict=True)) for row in rows], int(ids[part][-1]) + 1)

    def _write(self, rows: list[dict[str, Any]], stop: int) -> None:
        done = max(self._done, stop)
        with self.sql.database_errors(), self.sql.engine.begin() as connection:
            self._mark(connection, done)
            connection.execute(self._table.insert(), rows)
        self._done = done

    def _mark(self, connection: sa.Connection, done: int) -> None:
        """Record that all rows with an id below `done` were written.

        DatabaseError: the record is not as this export left it, so another one writes to the table too.
        """
        own_record = (self._exports.c.name == self._table.name) & (self._exports.c.done == self._done)
        if connection.execute(self._exports.update().where(own_record).values(done=done)).rowcount != 1:
            raise DatabaseError(f"{self}: another export is filling it; let it end, then run this again")

    def finish(self) -> None:
        """Record that all rows were written."""
        if self._done != self.record.rows:
            with self.sql.database_errors(), self.sql.engine.begin() as connection:
                self._mark(connection, self.record.rows)
            self._done = self.record.rows

    def delete(self, ids: Ids) -> None:
        """Delete the rows of ids (n,) that exist."""
        with self.sql.database_errors(), self.sql.engine.begin() as connection:
            for start in range(0, len(ids), IDS_PER_STATEMENT):
                chunk = ids[start : start + IDS_PER_STATEMENT].tolist()
                connection.execute(self._table.delete().where(self._table.c.id.in_(chunk)))

    def differ(self, ids: Ids, metadata: pa.Table) -> Ids:
        """Return those of ids (n,) whose rows exist with other values than these."""
        expected = dict(zip(ids.tolist(), zip(*self._values(metadata), strict=True), strict=True))
        stored = self.select(ids, [column.name for column in self.record.columns])
        return np.array([id for id, row in stored.items() if tuple(row) != expected[id]], dtype=np.int64)

    def _values(self, metadata: pa.Table) -> list[list[Any]]:
        return values(metadata, self.record.columns, nul=self.sql.kind != "postgresql")

    def select(self, ids: Ids, names: Sequence[str]) -> dict[int, Sequence[Any]]:
        """Return the values of these metadata columns by id, for those of ids (n,) that have a row."""
        import sqlalchemy as sa

        query = sa.select(self._table.c.id, *(self._column(name) for name in names))
        rows: dict[int, Sequence[Any]] = {}
        for start in range(0, len(ids), IDS_PER_STATEMENT):
            chunk = ids[start : start + IDS_PER_STATEMENT].tolist()
            rows |= {row[0]: row[1:] for row in self._all(query.where(self._table.c.id.in_(chunk)))}
        return rows

    def scan(self, names: Sequence[str], conditions: Sequence[Any]) -> Iterator[tuple[Ids, list[Sequence[Any]]]]:
        """Yield ids (n,) and the values of these columns for the rows that meet SQL conditions, in any order."""
        import sqlalchemy as sa

        query = sa.select(self._table.c.id, *(self._column(name) for name in names)).where(*conditions)
        with self.sql.database_errors(), self.sql.engine.connect() as connection:
            answer = connection.execute(query, execution_options={"yield_per": SCAN_ROWS})
            for rows in answer.partitions(SCAN_ROWS):
                yield np.array([row[0] for row in rows], dtype=np.int64), [row[1:] for row in rows]

    def among(self, name: str, values: Sequence[Any]) -> Any:
        """Return the SQL condition that a metadata column has one of these values."""
        return self._column(name).in_(values)

    def between(self, name: str, low: Any, high: Any) -> list[Any]:
        """Return the SQL conditions that low <= column <= high. A bound that is None gives no condition."""
        column = self._column(name)
        bounds = (None if low is None else column >= low, None if high is None else column <= high)
        return [bound for bound in bounds if bound is not None]

    def kind(self, name: str) -> str:
        """Return the kind of a metadata column's values."""
        return next(column.kind for column in self.record.columns if column.name == name)

    def _column(self, name: str) -> Any:
        at = next(at for at, column in enumerate(self.record.columns) if column.name == name)
        return self._table.c[f"c{at}"]

    def _all(self, statement: Any) -> Sequence[Any]:
        with self.sql.database_errors(), self.sql.engine.connect() as connection:
            return connection.execute(statement).all()


def _parse(url: str) -> sa.URL:
    import sqlalchemy as sa

    try:
        parsed = sa.engine.make_url(url if "://" in url else f"sqlite:///{url}")
        name, _, driver = parsed.drivername.partition("+")
    except (sa.exc.ArgumentError, ValueError):
        raise ConfigError("--sql is not understood: write kind://user:password@host:port/database") from None
    if name not in DRIVERS:
        raise ConfigError(f"--sql of kind {name} is not served: there are {', '.join(DRIVERS)}")
    return parsed if driver else parsed.set(drivername=f"{name}+{DRIVERS[name]}")
