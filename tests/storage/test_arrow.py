"""Parquet and Arrow IPC files are read by the calling thread alone."""

from __future__ import annotations

import ast
import io
import threading
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_batch.storage.arrow import ParquetFile, ipc_schema
from tests import ROOT

PACKAGE = ROOT / "clip_batch"

TABLE = pa.table({"key": [f"k{i}" for i in range(100)], "n": list(range(100)), "caption": [None, "a"] * 50})


class Piece(bytes):
    """Remembers which thread lets go of it."""

    threads: set[int]

    def __del__(self) -> None:
        self.threads.add(threading.get_ident())


class Watched(io.BytesIO):
    """Remembers which threads touch it and what it gave, and where they read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.threads: set[int] = set()
        self.starts: list[int] = []

    def read(self, size: int | None = -1, /) -> bytes:
        self.threads.add(threading.get_ident())
        self.starts.append(self.tell())
        piece = Piece(super().read(size))
        piece.threads = self.threads
        return piece

    def seek(self, *where: Any) -> int:
        self.threads.add(threading.get_ident())
        return super().seek(*where)


def written(table: pa.Table = TABLE, **how: Any) -> Watched:
    sink = io.BytesIO()
    pq.write_table(table, sink, **how)
    return Watched(sink.getvalue())


def as_ipc(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def test_a_file_is_read_by_the_calling_thread_alone() -> None:
    file = written(row_group_size=30)
    parquet = ParquetFile(file)
    assert (parquet.metadata.num_rows, parquet.schema) == (100, TABLE.schema)
    assert parquet.read().equals(TABLE)
    assert parquet.read(["caption", "key", "absent"]).equals(TABLE.select(["caption", "key"]))
    assert parquet.read(groups=[1, 2]).equals(TABLE.slice(30, 60))
    pieces = list(parquet.pieces(20, ["n"]))
    assert [len(piece) for piece in pieces] == [20, 10, 20, 10, 20, 10, 10]
    assert pa.concat_tables(pieces).equals(TABLE.select(["n"]))
    assert file.threads == {threading.get_ident()}


def test_no_row_group_is_an_empty_table() -> None:
    sink = io.BytesIO()
    pq.ParquetWriter(sink, TABLE.schema).close()
    parquet = ParquetFile(io.BytesIO(sink.getvalue()))
    assert parquet.metadata.num_row_groups == 0
    assert parquet.read(["key"]).equals(TABLE.select(["key"]).slice(0, 0))
    assert list(parquet.pieces(10)) == []


def test_rows_are_read_in_the_order_of_the_file() -> None:
    """So that a remote file is asked for each of its blocks once."""
    file = written(pa.table({name: list(range(10_000)) for name in "abcdef"}), row_group_size=1000)
    parquet = ParquetFile(file)
    for read in (parquet.read, lambda: list(parquet.pieces(3000))):
        file.starts.clear()
        read()
        assert len(file.starts) >= 60
        assert file.starts == sorted(file.starts)


@pytest.mark.parametrize("data", [b"", b"not Parquet, not Arrow", b"PAR1" * 9, b"ARROW1\0\0" * 2])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(pa.ArrowInvalid):
        ParquetFile(io.BytesIO(data))
    with pytest.raises(pa.ArrowInvalid):
        ipc_schema(io.BytesIO(data))


@pytest.mark.parametrize("table", [TABLE, TABLE.slice(0, 0)], ids=["rows", "empty"])
def test_the_schema_of_an_ipc_file(table: pa.Table) -> None:
    named = table.set_column(0, "key", table["key"].dictionary_encode()).replace_schema_metadata({"a": "b"})
    file = Watched(as_ipc(named))
    assert ipc_schema(file).equals(named.schema, check_metadata=True)
    assert file.threads == {threading.get_ident()}


THREADED = {"ParquetFile", "ParquetDataset", "read_table", "read_schema", "read_metadata", "read_pandas", "dataset"}


def test_the_package_reads_parquet_by_this_module_alone() -> None:
    """The demo's set aside, which is opened by its path."""
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).as_posix() not in ("storage/arrow.py", "demo/data.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in THREADED
        if isinstance(node.value, ast.Name) and node.value.id in ("pq", "ds")
    ]
    assert found == []
