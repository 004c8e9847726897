from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch import metadata
from clip_batch.errors import CorruptError
from clip_batch.store import Store


def table_of(rows: int, first: int = 0) -> pa.Table:
    numbers = range(first, first + rows)
    captions = [None if i % 3 == 0 else f"caption {i}" for i in numbers]
    return pa.table({"key": [f"k{i}" for i in numbers], "caption": pa.array(captions, pa.string()), "n": list(numbers)})


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> metadata.MetadataFile:
    """1,000 rows in batches of 64, in the order 999, 998, ..."""
    path = str(tmp_path_factory.mktemp("metadata") / "a.arrow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "BATCH_ROWS", 64)
        metadata.write_ordered(table_of(1000), np.arange(999, -1, -1), path)
    return metadata.open_table(path)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.integers(0, 999), max_size=200), ascending=st.booleans())
def test_take_gives_the_rows_in_the_order_asked(shard: metadata.MetadataFile, rows: list[int], ascending: bool) -> None:
    rows = sorted(rows) if ascending else rows
    taken = shard.take(rows)
    assert taken.column_names == ["key", "caption", "n"]
    assert taken["n"].to_pylist() == [999 - row for row in rows]
    assert taken["key"].to_pylist() == [f"k{999 - row}" for row in rows]
    assert shard.take(rows, ["n"]).to_pydict() == {"n": [999 - row for row in rows]}


@pytest.mark.parametrize("rows", [[-1], [1000], [3, 5000]])
def test_rows_that_are_not_there(shard: metadata.MetadataFile, rows: list[int]) -> None:
    assert shard.rows == 1000
    with pytest.raises(IndexError, match="0 to 999"):
        shard.take(rows)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 50), group=st.integers(1, 20), cuts=st.tuples(st.integers(0, 50), st.integers(0, 50)))
def test_a_run_of_a_part_with_its_lineage(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group: int, cuts: tuple[int, int]
) -> None:
    folder = tmp_path_factory.mktemp("part")
    pq.write_table(table_of(rows), folder / "a.parquet", row_group_size=group)
    store = Store(str(folder))
    start, stop = sorted(min(cut, rows) for cut in cuts)
    start, stop = (start - 1, stop) if start == stop == rows else (start, max(stop, start + 1))
    found = metadata.read_rows(store, "a.parquet", 7, start, stop)
    assert found["n"].to_pylist() == found["row"].to_pylist() == list(range(start, stop))
    assert found["partition"].to_pylist() == [7] * (stop - start)
    assert found.schema.field("row").type == pa.int32()
    assert metadata.count(store, "a.parquet") == (rows, rows - len(range(0, rows, 3)))


def test_captions_are_counted_without_statistics(tmp_path: Path) -> None:
    pq.write_table(table_of(10), tmp_path / "a.parquet", write_statistics=False)
    assert metadata.count(Store(str(tmp_path)), "a.parquet") == (10, 6)


def test_a_side_car_field_gives_way_to_the_lineage(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"], "row": ["their own"], "caption": ["x"]}), tmp_path / "a.parquet")
    found = metadata.read_rows(Store(str(tmp_path)), "a.parquet", 2, 0, 1)
    assert found.to_pylist() == [{"key": "a", "json_row": "their own", "caption": "x", "partition": 2, "row": 0}]


def test_columns_beyond_32_bit_offsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the limit, strings move with 64-bit offsets, and lie in the file with 32-bit ones."""
    monkeypatch.setattr(metadata, "_OFFSETS_LIMIT", 10)
    order = np.random.default_rng(0).permutation(100)
    metadata.write_ordered(pa.concat_tables([table_of(60), table_of(40, 60)]), order, str(tmp_path / "a.arrow"))
    opened = metadata.open_table(str(tmp_path / "a.arrow"))
    assert opened.schema.field("key").type == pa.string()
    assert opened.take(np.arange(100))["n"].to_pylist() == order.tolist()


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(b"ARROW1 but not much more")
    with pytest.raises(CorruptError, match=r"a\.arrow is not a readable Arrow file"):
        metadata.open_table(str(tmp_path / "a.arrow"))
    with pytest.raises(CorruptError, match=r"b\.parquet is not readable"):
        metadata.count(Store(str(tmp_path)), "b.parquet")
    pq.write_table(table_of(5), tmp_path / "c.parquet")
    with pytest.raises(CorruptError, match="has only 5 rows"):
        metadata.read_rows(Store(str(tmp_path)), "c.parquet", 0, 3, 6)
    with pytest.raises(CorruptError, match="schemas differ"):
        metadata.concat([table_of(2), table_of(2).drop_columns(["n"])], "OUT")
