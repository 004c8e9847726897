from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.embeddings.metadata import count, read_rows
from clip_batch.errors import CorruptError
from clip_batch.index import metadata, metadata_writer
from clip_batch.storage.store import Store


def table_of(rows: int, first: int = 0) -> pa.Table:
    numbers = range(first, first + rows)
    captions = [None if i % 3 == 0 else f"caption {i}" for i in numbers]
    return pa.table({"key": [f"k{i}" for i in numbers], "caption": pa.array(captions, pa.string()), "n": list(numbers)})


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> metadata.MetadataFile:
    """1,000 rows in batches of 64, in the order 999, 998, ..."""
    path = str(tmp_path_factory.mktemp("metadata") / "a.arrow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata_writer, "BATCH_ROWS", 64)
        metadata_writer.write_ordered([table_of(1000)], np.arange(999, -1, -1), path)
    return metadata.MetadataFile(path)


@settings(max_examples=50)
@given(rows=st.lists(st.integers(0, 999), max_size=200), ascending=st.booleans())
def test_take_gives_the_rows_in_the_order_asked(shard: metadata.MetadataFile, rows: list[int], ascending: bool) -> None:
    rows = sorted(rows) if ascending else rows
    taken = shard.take(rows)
    assert taken.column_names == ["key", "caption", "n"]
    assert taken["n"].to_pylist() == [999 - row for row in rows]
    assert taken["key"].to_pylist() == [f"k{999 - row}" for row in rows]
    assert shard.take(rows, ["n"]).to_pydict() == {"n": [999 - row for row in rows]}


def test_a_few_rows_of_one_batch_are_taken_without_other_threads(
    shard: metadata.MetadataFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata._readers(os.getpid()), "map", None)
    assert shard.take([5, 3, 5])["n"].to_pylist() == [994, 996, 994]
    with pytest.raises(TypeError):
        shard.take([5, 70])


@pytest.mark.parametrize("rows", [[-1], [1000], [3, 5000]])
def test_rows_that_are_not_there(shard: metadata.MetadataFile, rows: list[int]) -> None:
    assert shard.rows == 1000
    with pytest.raises(IndexError, match="0 to 999"):
        shard.take(rows)


@settings(max_examples=30)
@given(rows=st.integers(1, 50), group=st.integers(1, 20), cuts=st.tuples(st.integers(0, 50), st.integers(0, 50)))
def test_a_run_of_a_part_with_its_lineage(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group: int, cuts: tuple[int, int]
) -> None:
    folder = tmp_path_factory.mktemp("part")
    pq.write_table(table_of(rows), folder / "a.parquet", row_group_size=group)
    store = Store(str(folder))
    start, stop = sorted(min(cut, rows) for cut in cuts)
    start, stop = (start - 1, stop) if start == stop == rows else (start, max(stop, start + 1))
    found = read_rows(store, "a.parquet", 7, start, stop)
    assert found["n"].to_pylist() == found["row"].to_pylist() == list(range(start, stop))
    assert found["partition"].to_pylist() == [7] * (stop - start)
    assert found.schema.field("row").type == pa.int32()
    assert count(store, "a.parquet") == (rows, rows - len(range(0, rows, 3)))


def test_captions_are_counted_without_statistics(tmp_path: Path) -> None:
    pq.write_table(table_of(10), tmp_path / "a.parquet", write_statistics=False)
    assert count(Store(str(tmp_path)), "a.parquet") == (10, 6)


def test_a_side_car_field_gives_way_to_the_lineage(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"], "row": ["their own"], "caption": ["x"]}), tmp_path / "a.parquet")
    found = read_rows(Store(str(tmp_path)), "a.parquet", 2, 0, 1)
    assert found.to_pylist() == [{"key": "a", "json_row": "their own", "caption": "x", "partition": 2, "row": 0}]


TEXT = st.one_of(st.none(), st.sampled_from(["", "a", "\u00e4\U0001f600", "long " * 20]), st.text(max_size=5))
COLUMNS = st.integers(0, 60).flatmap(
    lambda rows: st.fixed_dictionaries(
        {
            "caption": st.lists(TEXT, min_size=rows, max_size=rows).map(lambda values: pa.array(values, pa.string())),
            "shard": st.lists(
                st.sampled_from(["s3://bucket/0.tar", "s3://bucket/1.tar"]), min_size=rows, max_size=rows
            ).map(lambda values: pa.array(values, pa.string())),
            "gaps": st.lists(st.sampled_from([None, "the same long value"]), min_size=rows, max_size=rows).map(
                lambda values: pa.array(values, pa.string())
            ),
            "ratio": st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=rows, max_size=rows).map(
                lambda values: pa.array(values, pa.float64())
            ),
            "n": st.just(pa.array(range(rows), pa.int64())),
        }
    )
)


@settings(max_examples=60)
@given(columns=COLUMNS, batch=st.integers(1, 30), run=st.sampled_from([0, 1, 8, 1024]), data=st.data())
def test_write_and_take_are_the_naive_reorder_and_take(
    tmp_path_factory: pytest.TempPathFactory,
    columns: dict[str, pa.Array],
    batch: int,
    run: int,
    data: st.DataObject,
) -> None:
    """For any split into tables, order (rows left out too), record batches; any rows asked, of any limit of bytes."""
    table = pa.table(columns)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(table)), max_size=5))), len(table)]
    tables = [table.slice(low, high - low) for low, high in zip(cuts, cuts[1:], strict=False)]
    order = np.array(data.draw(st.permutations(range(len(table)))), dtype=np.int64)
    order = order[: data.draw(st.integers(0, len(table)))]
    folder = tmp_path_factory.mktemp("ordered")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata_writer, "BATCH_ROWS", batch)
        patch.setattr(metadata, "RUN", run)
        metadata_writer.write_ordered(iter(tables), order, str(folder / "a.arrow"))
        assert [path.name for path in folder.iterdir()] == ["a.arrow"]
        opened = metadata.MetadataFile(str(folder / "a.arrow"))
        naive = table.take(pa.array(order))
        assert opened.rows == len(order) and opened.schema == table.schema
        assert opened.take(np.arange(len(order))).equals(naive)
        rows = data.draw(st.lists(st.integers(0, len(order) - 1), max_size=100)) if len(order) else []
        patch.setattr(metadata, "LONGEST", data.draw(st.sampled_from([1, 50, 2**31 - 1])))
        taken = opened.take(rows)
        taken.validate(full=True)
        assert taken.equals(naive.take(pa.array(rows, pa.int64())))
        names = data.draw(st.lists(st.sampled_from(table.column_names), min_size=1, unique=True))
        assert opened.take(rows, names).equals(taken.select(names))


def read_raw(path: Path) -> pa.Table:
    return pa.ipc.open_file(path).read_all()


def test_a_dictionary_where_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the bytes at the most, and not too many values; decided for each file, over all its tables."""
    monkeypatch.setattr(metadata_writer, "BATCH_ROWS", 100)
    tables = [
        pa.table(
            {
                "shard": pa.array([f"s3://bucket/laion/{number:06d}.tar"] * 100),
                "key": pa.array([f"a key of its own {number} {i}" for i in range(100)]),
                "short": pa.array([None, "ok"] * 50),
                "none": pa.array([None] * 100, pa.string()),
            }
        )
        for number in range(10)
    ]
    order = np.random.default_rng(0).permutation(1000)
    wanted = pa.concat_tables(tables).take(pa.array(order))
    metadata_writer.write_ordered(tables, order, str(tmp_path / "a.arrow"))
    raw = read_raw(tmp_path / "a.arrow")
    assert [field.name for field in raw.schema if pa.types.is_dictionary(field.type)] == ["shard"]
    assert raw.to_pylist() == wanted.to_pylist()
    opened = metadata.MetadataFile(str(tmp_path / "a.arrow"))
    assert opened.schema == tables[0].schema
    assert opened.take(np.arange(1000)).equals(wanted)
    monkeypatch.setattr(metadata_writer, "DICTIONARY_VALUES", 9)
    metadata_writer.write_ordered(tables, order, str(tmp_path / "b.arrow"))
    assert read_raw(tmp_path / "b.arrow").schema == tables[0].schema
    monkeypatch.undo()
    monkeypatch.setattr(metadata_writer, "DICTIONARY_BYTES", 200)
    metadata_writer.write_ordered(tables, order, str(tmp_path / "c.arrow"))
    assert read_raw(tmp_path / "c.arrow").schema == tables[0].schema


def test_a_dictionary_that_grows_within_the_file(tmp_path: Path) -> None:
    """Arrow files of others may add to a dictionary from record batch to record batch."""
    path, options = tmp_path / "a.arrow", pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    schema = pa.schema({"shard": pa.dictionary(pa.int8(), pa.string())})
    pieces = [pa.DictionaryArray.from_arrays(pa.array([0, n], pa.int8()), ["a", "b", "c"][: n + 1]) for n in range(3)]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        for piece in pieces:
            writer.write_batch(pa.record_batch([piece], schema=schema))
    opened = metadata.MetadataFile(str(path))
    assert opened.schema == pa.schema({"shard": pa.string()})
    assert opened.take([5, 1, 3, 3, 0]).to_pydict() == {"shard": ["c", "a", "b", "b", "a"]}


def test_the_memory_of_writing_is_some_record_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow's peak is a small part of what is written."""
    monkeypatch.setattr(metadata_writer, "BATCH_BYTES", 2**20)
    monkeypatch.setattr(metadata_writer, "DICTIONARY_VALUES", 1000)
    rows, parts = 10_000, 40

    def tables() -> Iterator[pa.Table]:
        for part in range(parts):
            numbers = pa.array(np.arange(part * rows, (part + 1) * rows))
            yield pa.table(
                {"n": numbers, "caption": pc.binary_join_element_wise("x" * 90, numbers.cast("string"), " ")}
            )

    order = np.random.default_rng(0).permutation(rows * parts)
    before = pa.default_memory_pool()
    pool = pa.system_memory_pool()
    pa.set_memory_pool(pool)
    try:
        metadata_writer.write_ordered(tables(), order, str(tmp_path / "a.arrow"))
        written = (tmp_path / "a.arrow").stat().st_size
        assert written > 40 * 2**20
        assert pool.max_memory() < written / 4
    finally:
        pa.set_memory_pool(before)
    opened = metadata.MetadataFile(str(tmp_path / "a.arrow"))
    assert opened.take([0, rows * parts - 1], ["n"])["n"].to_pylist() == [order[0], order[-1]]


@pytest.mark.slow
def test_more_bytes_than_32_bit_offsets_reach(tmp_path: Path) -> None:
    """2.2 GB of one column, asked for by repeating rows: in order, and in an order to restore."""
    path = str(tmp_path / "a.arrow")
    metadata_writer.write_ordered([pa.table({"caption": ["x" * 2**20, "y" * 2**20], "n": [0, 1]})], np.arange(2), path)
    opened = metadata.MetadataFile(path)
    rows = np.zeros(2200, dtype=np.int64)
    rows[-1] = 1
    taken = opened.take(rows)
    assert len(taken) == 2200 and taken["caption"].num_chunks > 1
    assert set(pc.binary_length(taken["caption"]).to_pylist()) == {2**20}
    assert taken["caption"][-1].as_py()[0] == "y" and taken["n"].to_pylist() == rows.tolist()


def test_tables_of_different_schemas_are_refused(tmp_path: Path) -> None:
    tables = [table_of(2), table_of(2, 2).drop_columns(["n"])]
    with pytest.raises(CorruptError, match=r"^OUT: metadata schemas differ among partitions \(less, not n: int64\)"):
        list(metadata_writer.same_schema(tables, "OUT"))
    with pytest.raises(CorruptError, match="schemas differ"):
        metadata_writer.write_ordered(tables, np.arange(4), str(tmp_path / "a.arrow"))
    assert not list(tmp_path.iterdir())
    other = table_of(2).set_column(2, "n", pa.array(["1", "2"]))
    with pytest.raises(CorruptError, match="n: string, not n: int64"):
        list(metadata_writer.same_schema([table_of(2), other], "OUT"))
    with pytest.raises(ValueError, match="no table"):
        metadata_writer.write_ordered([], np.arange(0), str(tmp_path / "a.arrow"))
    with pytest.raises(IndexError):
        metadata_writer.write_ordered([table_of(2)], np.array([2]), str(tmp_path / "a.arrow"))


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(b"ARROW1 but not much more")
    with pytest.raises(CorruptError, match=r"a\.arrow is not a readable Arrow file"):
        metadata.MetadataFile(str(tmp_path / "a.arrow"))
    with pytest.raises(CorruptError, match=r"b\.parquet is not readable"):
        count(Store(str(tmp_path)), "b.parquet")
    pq.write_table(table_of(5), tmp_path / "c.parquet")
    with pytest.raises(CorruptError, match="has only 5 rows"):
        read_rows(Store(str(tmp_path)), "c.parquet", 0, 3, 6)
    (tmp_path / "d.arrow").touch()
    with pytest.raises(CorruptError, match=r"d\.arrow is not a readable Arrow file"):
        metadata.MetadataFile(str(tmp_path / "d.arrow"))


def test_a_scan_has_every_row_in_order_in_the_types_asked(tmp_path: Path) -> None:
    rows = 5000
    rng = np.random.default_rng(1)
    sites = [None if i % 7 == 0 else f"site {i % 9}" for i in range(rows)]
    tags = [None if i % 5 == 0 else [str(i % 3)] for i in range(rows)]
    table = pa.table({"site": sites, "n": pa.array([None, *range(rows - 1)]), "tags": tags})
    order = rng.permutation(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata_writer, "BATCH_ROWS", 512)
        metadata_writer.write_ordered([table], order, str(tmp_path / "a.arrow"))
    shard = metadata.MetadataFile(str(tmp_path / "a.arrow"))
    right = table.take(pa.array(order))
    schema = pa.schema([("tags", table["tags"].type), ("site", pa.string()), ("n", pa.string()), ("new", pa.int64())])
    batches = list(shard.scan(schema))
    assert len(batches) > 5
    assert all(pa.types.is_dictionary(batch.column("site").type) for batch in batches)
    found = {name: [value for batch in batches for value in batch.column(name).to_pylist()] for name in schema.names}
    assert found["site"] == right["site"].to_pylist()
    assert found["tags"] == right["tags"].to_pylist()
    assert found["n"] == right["n"].cast(pa.string()).to_pylist()
    assert found["new"] == [None] * rows


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[metadata.MetadataFile]:
    """Three files of 200 rows in batches of 64; each has a dictionary of its own for a column with nulls."""
    folder, made = tmp_path_factory.mktemp("files"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata_writer, "BATCH_ROWS", 64)
        for number in range(3):
            sites = [None if i % 7 == 0 else f"site {number} {i % 3}" for i in range(200)]
            table = table_of(200, 1000 * number).append_column("site", pa.array(sites, pa.string()))
            metadata_writer.write_ordered([table], np.arange(200), str(folder / f"{number}.arrow"))
            made.append(metadata.MetadataFile(str(folder / f"{number}.arrow")))
    assert made[0].dictionaries == {"site"}
    return made


@settings(max_examples=50)
@given(
    places=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 199)), max_size=70),
    columns=st.lists(st.sampled_from(["key", "caption", "n", "site"]), unique=True),
)
def test_a_few_rows_of_many_files(
    files: list[metadata.MetadataFile], places: list[tuple[int, int]], columns: list[str]
) -> None:
    numbers, rows = [number for number, _ in places], np.array([row for _, row in places], dtype=np.int64)
    assert metadata.uniform(files)
    table = metadata.take_few([files[number] for number in numbers], rows, columns)
    one_batch_each = len({(number, row // 64) for number, row in places}) == len(set(numbers))
    assert (table is not None) == bool(columns and 0 < len(rows) <= metadata.FEW and one_batch_each)
    if table is not None:
        expected = pa.concat_tables([files[number].take([row], columns) for number, row in places])
        assert table.equals(expected.combine_chunks()) and table.schema.equals(expected.schema)


def test_files_of_other_columns_or_dictionaries_are_not_uniform(
    files: list[metadata.MetadataFile], shard: metadata.MetadataFile, tmp_path: Path
) -> None:
    assert not metadata.uniform([*files, shard])
    unlike = table_of(200).append_column("site", pa.array([f"site {i}" for i in range(200)]))
    metadata_writer.write_ordered([unlike], np.arange(200), str(tmp_path / "a.arrow"))
    other = metadata.MetadataFile(str(tmp_path / "a.arrow"))
    assert other.schema == files[0].schema and not other.dictionaries
    assert not metadata.uniform([*files, other])
