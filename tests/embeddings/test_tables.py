"""Metadata Parquet of others: each row's values are its own, whatever the other rows of the piece hold."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_batch.embeddings import metadata
from clip_batch.embeddings.tables import Tables
from clip_batch.errors import ClipBatchError
from clip_batch.samples.tar.beside import captions_beside
from clip_batch.storage.arrow import caption_column, text_column
from clip_batch.storage.store import Store


def unchecked(cells: list[bytes | None]) -> pa.Array:
    """Return bytes as an array that calls itself a string, as a writer leaves it that does not check."""
    return pa.Array.from_buffers(pa.string(), len(cells), pa.array(cells, pa.binary()).buffers())


def read(folder: Path, *tables: pa.Table) -> pa.Table:
    """Return what `Tables` reads of the given files."""
    files = [(number, f"metadata_{number}.parquet") for number in range(len(tables))]
    for (_, name), table in zip(files, tables, strict=True):
        pq.write_table(table, folder / name)
    reader = Tables(Store(str(folder)), files)
    return pa.concat_tables(reader.read(number, name, 0, reader.rows(name)) for number, name in files)


CELLS = [b"a cat", b"caf\xe9", None, "猫".encode()]
TEXTS = ["a cat", "caf\ufffd", None, "猫"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(CELLS, pa.binary()),
        pa.array(CELLS, pa.large_binary()),
        pa.array(CELLS).dictionary_encode(),
        unchecked(CELLS),
        unchecked(CELLS).cast(pa.large_string()),
    ],
    ids=["binary", "large", "dictionary", "string", "large_string"],
)
def test_undecodable_bytes_concern_their_own_row(tmp_path: Path, column: pa.Array) -> None:
    table = read(tmp_path, pa.table({"caption": column, "url": column, "image_path": column}))
    for name in ("caption", "url", "image_path"):
        assert table[name].to_pylist() == TEXTS
    assert table["key"].to_pylist() == ["a cat", "caf\ufffd", "2", "猫"]
    table.validate(full=True)


def test_a_list_of_captions_is_its_first_text_and_nan_is_null(tmp_path: Path) -> None:
    lists = [["", None, " ", "a cat", "a pet"], [], None, ["a dog"]]
    nan = [float("nan"), None, 1.5, 2.0]
    first = pa.table({"exif": [{"a": 1, "b": 2}] * 4, "caption": lists, "score": nan, "tags": lists})
    second = pa.table({"exif": ["x"] * 4, "caption": nan, "score": ["high"] * 4, "tags": ["one"] * 4})
    table = read(tmp_path, first, second)
    captions = ["a cat", None, None, "a dog", None, None, "1.5", "2"]
    assert table["caption"].to_pylist() == captions
    assert table["score"].to_pylist() == [None, None, "1.5", "2", *["high"] * 4]
    assert table["tags"].to_pylist()[:2] == ['["", null, " ", "a cat", "a pet"]', "[]"]
    for number, name in enumerate(("metadata_0.parquet", "metadata_1.parquet")):
        store, missing = Store(str(tmp_path)), [caption is None for caption in captions[4 * number :][:4]]
        assert metadata.without_caption(store, name).tolist() == missing
        assert metadata.count(store, name) == (4, 2)


def test_captions_are_counted_behind_a_column_of_structs(tmp_path: Path) -> None:
    table = pa.table({"exif": [{"a": 1, "b": None}] * 3, "caption": ["a", None, None]})
    pq.write_table(table, tmp_path / "metadata.parquet")
    assert metadata.count(Store(str(tmp_path)), "metadata.parquet") == (3, 1)


def test_whole_numbers_that_a_double_cannot_hold_are_rounded_not_dropped(tmp_path: Path) -> None:
    table = read(tmp_path, pa.table({"id": [2**53 + 1, 7]}), pa.table({"id": [0.5, None]}))
    assert table["id"].to_pylist() == [float(2**53), 7.0, 0.5, None]


def test_values_inside_lists_and_objects_are_strict_json() -> None:
    cells = [{"a": b"\xe9", "b": [float("nan"), float("inf"), 1.0]}, None]
    column = pa.chunked_array([pa.array(cells)])
    assert text_column(column).to_pylist() == ['{"a": "\ufffd", "b": [null, "inf", 1.0]}', None]
    assert caption_column(column).to_pylist() == [None, None]
    nested = pa.ListArray.from_arrays(pa.array([0, 2, 4]), unchecked(CELLS))
    stored = io.BytesIO()
    pq.write_table(pa.table({"c": nested}), stored)
    column = pq.read_table(stored)["c"]
    assert text_column(column).to_pylist() == ['["a cat", "caf\ufffd"]', '[null, "猫"]']
    assert caption_column(column).to_pylist() == ["a cat", "猫"]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1), st.binary(min_size=1, max_size=8))
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, place: float, noise: bytes) -> None:
    stored = io.BytesIO()
    pq.write_table(pa.table({"key": TEXTS, "caption": [[text] for text in TEXTS], "exif": [{"a": 1}] * 4}), stored)
    data, at = stored.getvalue(), int(place * len(stored.getvalue()))
    (tmp_path / "x.parquet").write_bytes(data[:at] + noise + data[at + len(noise) :])
    with contextlib.suppress(ClipBatchError):
        tables = Tables(Store(str(tmp_path)), [(0, "x.parquet")])
        tables.read(0, "x.parquet", 0, tables.rows("x.parquet"))
    with contextlib.suppress(ClipBatchError):
        captions_beside(f"{tmp_path}/x.tar", "caption", ["a cat"], None)
