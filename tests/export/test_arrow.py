"""`clip_batch.read`: the rows of OUT and of INDEX as Arrow datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from clip_batch import ConfigError, EmbedConfig, MergeConfig, PlanConfig, Searcher, embed, make_plan, merge, read
from clip_batch.export import arrow
from clip_batch.index.remove import remove
from clip_batch.plan import paths
from clip_batch.storage.npy import unit
from tests import corpus


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of three partitions, and INDEX of two shards, one row of which was removed."""
    home = tmp_path_factory.mktemp("arrow")
    for number in range(3):
        corpus.good_tar(f"{home}/{number}.tar", 12)
    make_plan(f"{home}/*.tar", home / "out", PlanConfig(model="fake:8", partition_count=3))
    embed(home / "out", EmbedConfig(device="cpu"))
    merge(home / "out", home / "index", MergeConfig(shard_rows=20))
    return home


def committed(home: Path) -> tuple[pa.Table, np.ndarray]:
    """The metadata and the vectors of OUT, read from its files."""
    files = sorted((home / "out" / "metadata").glob("*.parquet"))
    tables = [pq.read_table(file) for file in files]
    vectors = [np.load(str(file).replace("metadata", "img_emb").replace(".parquet", ".npy")) for file in files]
    return pa.concat_tables(tables), unit(np.concatenate(vectors))


def vectors_of(table: pa.Table, name: str = "image_vector") -> np.ndarray:
    return np.stack([np.asarray(vector, np.float32) for vector in table[name].to_pylist()])


def test_rows_of_out_are_those_of_its_commits(home: Path) -> None:
    rows = read(home / "out")
    metadata, vectors = committed(home)
    table = rows.to_table()
    assert isinstance(rows, pa.dataset.Dataset) and table.schema == rows.schema
    assert table.schema.field("image_vector").type == pa.list_(pa.float32(), 8)
    assert table.select(metadata.column_names).equals(metadata)
    assert np.array_equal(vectors_of(table), vectors)
    assert table["partition"].to_pylist() == [0] * 12 + [1] * 12 + [2] * 12
    assert rows.count_rows() == 36 and len(rows.to_pandas(columns=["key"])) == 36
    assert "36 rows" in repr(rows)


def test_a_row_without_a_caption_has_a_null_for_its_text_vector(tmp_path: Path) -> None:
    members = [("a.jpg", corpus.jpeg(1)), ("a.txt", b"a cat"), ("b.jpg", corpus.jpeg(2))]
    corpus.write_tar(f"{tmp_path}/a.tar", members)
    make_plan(tmp_path / "a.tar", tmp_path / "out", PlanConfig(model="fake:8"))
    embed(tmp_path / "out")
    assert [vector is None for vector in read(tmp_path / "out").to_table()["text_vector"].to_pylist()] == [False, True]


def test_columns_and_filters(home: Path) -> None:
    rows = read(home / "out")
    key = rows.to_table(columns=["key"])["key"].to_pylist()[15]
    one = rows.to_table(columns=["image_vector", "row"], filter=(pc.field("key") == key) & (pc.field("partition") == 1))
    assert one.column_names == ["image_vector", "row"] and one["row"].to_pylist() == [3]
    assert np.array_equal(vectors_of(one)[0], committed(home)[1][15])
    assert rows.count_rows(pc.field("row") < 2) == 6
    assert rows.head(5, columns=["row"])["row"].to_pylist() == [0, 1, 2, 3, 4]
    doubled = rows.to_table(columns={"twice": pc.field("row") * 2}, filter=pc.field("partition") == 2)
    assert doubled["twice"].to_pylist()[:3] == [0, 2, 4] and doubled.column_names == ["twice"]
    assert rows.to_table(filter=pc.field("key") == "nobody").schema == rows.schema
    assert rows.count_rows(pc.field("text_vector").is_valid()) == 36
    with pytest.raises(ConfigError, match="no column 'nothing': there are key"):
        rows.to_table(columns=["nothing"])
    with pytest.raises(ConfigError, match="give to_table columns and a filter"):
        rows.sort_by("key")


def test_a_filter_decides_which_vectors_and_row_groups_are_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_rows: list[int] = []
    groups: list[Any] = []
    scan = arrow.Embeddings.scan_metadata

    def spied(self: Any, commit: Any, columns: Any, keep: Any) -> Any:
        def kept(file: Any) -> Any:
            groups.append((columns, list(keep(file))))
            return groups[-1][1]

        return scan(self, commit, columns, kept)

    monkeypatch.setattr(arrow.Embeddings, "scan_metadata", spied)
    monkeypatch.setattr(arrow, "unit", lambda half: read_rows.append(len(half)) or unit(half))
    keys = sorted(read(home / "out").to_table(columns=["key"], filter=pc.field("row") >= 0)["key"].to_pylist())
    groups.clear()
    table = read(home / "out").to_table(columns=["image_vector"], filter=pc.field("key") == keys[0])
    assert sum(read_rows) == len(table) == 3
    assert groups == [(["key"], [0])] * 3
    groups.clear()
    assert read(home / "out").to_table(columns=["caption"], filter=pc.field("key") == "zzz").num_rows == 0
    assert groups == [(["key", "caption"], [])] * 3, "statistics show that no row group has it"


def test_rows_of_an_index_have_ids_and_lack_the_removed(home: Path, tmp_path: Path) -> None:
    merge(home / "out", tmp_path / "index", MergeConfig(shard_rows=20))
    with read(tmp_path / "index") as before, Searcher(tmp_path / "index") as searcher:
        table = before.to_table()
        assert table["id"].to_pylist() == list(range(36)) and before.count_rows() == 36
        assert np.allclose(vectors_of(table), searcher.reconstruct(range(36)), atol=1e-6)
        assert table["key"].to_pylist() == searcher.table(range(36))["key"].to_pylist()
        assert before.to_table(columns=["id"], filter=pc.field("id") == 30)["id"].to_pylist() == [30]
    gone = table["key"][0].as_py()
    (tmp_path / "keys.txt").write_text(gone)
    removed = remove(tmp_path / "index", tmp_path / "keys.txt").rows
    with read(tmp_path / "index") as after:
        assert after.count_rows() == len(after.to_table(columns=["id"])) == 36 - removed < 36
        assert gone not in after.to_table(columns=["key"])["key"].to_pylist()


def test_only_commits_are_read(home: Path, tmp_path: Path) -> None:
    make_plan(f"{home}/*.tar", tmp_path / "out", PlanConfig(model="fake:8", partition_count=3))
    embed(tmp_path / "out", partitions=[1])
    stray = tmp_path / "out" / paths.METADATA / "metadata_0000-abcdef01.parquet"
    stray.write_bytes(b"an attempt that was killed")
    assert set(read(tmp_path / "out").to_table()["partition"].to_pylist()) == {1}


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is neither an embeddings folder nor an index"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="source is 5"):
        read(5)  # type: ignore[arg-type]


def test_other_libraries_read_the_dataset(home: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    rows = read(home / "out")  # noqa: F841
    assert duckdb.sql("select count(*) from rows where partition = 1").fetchall() == [(12,)]
    polars = pytest.importorskip("polars")
    frame = polars.scan_pyarrow_dataset(read(home / "out")).filter(polars.col("row") < 2).collect()
    assert len(frame) == 6


def test_a_scanner_streams(home: Path) -> None:
    scanner = read(home / "out").scanner(columns=["row", "image_vector"], filter=pc.field("row") < 2)
    assert scanner.to_table()["row"].to_pylist() == [0, 1] * 3


def test_rows_come_in_small_batches(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow, "ROWS", 5)
    for source in ("out", "index"):
        with read(home / source) as rows:
            assert max(map(len, rows.to_batches())) == 5 and sum(map(len, rows.to_batches(["key"]))) == 36


def test_a_remote_index_is_copied_only_for_its_vectors(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.put(str(home / "index"), "/arrow/index", recursive=True)
    wanted = read(home / "index").to_table()
    with read("memory://arrow/index") as rows:
        assert rows.schema == wanted.schema and rows.count_rows() == len(wanted)
        assert rows.to_table(columns=["key", "id"]).equals(wanted.select(["key", "id"]))
        assert rows.count_rows(pc.field("row") < 2) == pc.sum(pc.less(wanted["row"], 2)).as_py()
        assert not list(tmp_path.rglob("*.index"))
        assert rows.to_table().equals(wanted)
        assert list(tmp_path.rglob("*.index"))
    memory.rm("/arrow", recursive=True)
