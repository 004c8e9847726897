"""`embed_table`: rows of each kind of table become commits, exactly once, and go on where they were stopped."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import clip_batch
from clip_batch import ConfigError, EmbedConfig, Encoder, InputError, PlanConfig, PlanError, Searcher, embed_table
from clip_batch.api import table as tables
from clip_batch.types import CAPTION_FIELDS
from tests import corpus

PLAN, CPU = PlanConfig(model="fake:8"), EmbedConfig(device="cpu")


def rows(count: int = 5) -> list[dict[str, Any]]:
    return [{"image": corpus.jpeg(n), "caption": f"picture {n}", "width": n} for n in range(count)]


@pytest.mark.parametrize("more", [{}, {"image": "a.jpg"}, {"image": b"x"}], ids=["none", "path", "bytes"])
def test_captions_alone(more: dict[str, Any], tmp_path: Path) -> None:
    captions = [{"caption": f"picture {n}", "width": n} | more for n in range(4)] + [{"caption": None} | more]
    lines: list[str] = []
    done = embed_table(
        captions, tmp_path / "out", PlanConfig(model="fake:8", modalities=["text"]), CPU, progress=lines.append
    )
    assert (done.rows, done.failures) == (4, {"missing_caption": 1}) and not any("no picture" in line for line in lines)
    table = clip_batch.read(tmp_path / "out").to_table()
    assert "image_vector" not in table.schema.names
    found = table.column("text_vector").to_pylist()
    assert np.allclose(found, Encoder("fake:8").texts([row["caption"] for row in captions[:4]]), atol=1e-3)


class Feature:
    """Hugging Face's `Image`, as far as it is looked at."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class HuggingFace(list[dict[str, Any]]):
    """A data set that decodes pictures unless it is cast not to."""

    features: ClassVar = {"image": Feature()}

    def cast_column(self, name: str, feature: Feature) -> list[dict[str, Any]]:
        assert name == "image" and not feature.decode
        return [row | {"image": {"bytes": row["image"], "path": None}} for row in self]


@pytest.mark.parametrize(
    "kind",
    [
        pd.DataFrame,
        pa.Table.from_pylist,
        pa.RecordBatch.from_pylist,
        lambda rows: pa.Table.from_pylist(rows).to_reader(2),
        HuggingFace,
        iter,
        list,
    ],
    ids=["pandas", "table", "batch", "reader", "huggingface", "generator", "list"],
)
def test_each_kind_of_table(kind: Any, tmp_path: Path) -> None:
    done = embed_table(kind(rows()), tmp_path / "out", PLAN, CPU)
    assert (done.rows, done.missing, done.failures) == (5, [], {})
    table = clip_batch.read(tmp_path / "out").to_table()
    assert table["caption"].to_pylist() == [f"picture {n}" for n in range(5)]
    assert table["width"].to_pylist() == list(range(5))
    assert table["key"].to_pylist() == [f"{n:012d}" for n in range(5)]
    expected = Encoder("fake:8").images([row["image"] for row in rows()])
    assert np.allclose(np.stack([np.asarray(v) for v in table["image_vector"].to_pylist()]), expected, atol=2e-3)
    assert clip_batch.verify(tmp_path / "out", deep=True).ok


def test_searches_show_the_pictures(tmp_path: Path) -> None:
    embed_table(rows(), tmp_path / "out", PLAN, CPU)
    clip_batch.merge(tmp_path / "out", tmp_path / "index")
    with Searcher(tmp_path / "index") as searcher:
        hits = searcher.find("a cat").hits
        assert {hit.metadata["width"]: hit.image() for hit in hits} == {n: corpus.jpeg(n) for n in range(5)}


def test_pictures_of_each_form_and_those_that_fail(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(corpus.jpeg(1))
    picture = Image.open(io.BytesIO(corpus.jpeg(2)))
    images = [str(tmp_path / "a.jpg"), tmp_path / "a.jpg", picture, np.asarray(picture), {"bytes": corpus.jpeg(3)}]
    bad = [None, float("nan"), str(tmp_path / "absent.jpg"), b"no picture", {"bytes": None, "path": None}]
    lines: list[str] = []
    table = [{"image": image, "when": pd.Timestamp("2026-01-02"), "n": np.int64(3)} for image in [*images, *bad]]
    done = embed_table(table, tmp_path / "out", PLAN, CPU, progress=lines.append)
    assert (done.rows, done.failures) == (5, {"missing_image": 4, "undecodable_image": 1})
    assert [line for line in lines if line.startswith("row 7 has no picture, and will be listed as failed")]
    read = clip_batch.read(tmp_path / "out").to_table()
    assert read["image_path"].to_pylist()[:3] == [str(tmp_path / "a.jpg")] * 2 + [None]
    assert set(read["when"].to_pylist()) == {"2026-01-02T00:00:00"} and set(read["n"].to_pylist()) == {3}
    assert read["caption"].null_count == 5
    assert clip_batch.verify(tmp_path / "out", deep=True).ok


def failures(out: Path) -> list[dict[str, Any]]:
    """The failures of OUT, in the order of their keys."""
    found = [row for file in out.rglob("failures/**/*.parquet") for row in pq.read_table(file).to_pylist()]
    return sorted(found, key=lambda row: str(row["key"]))


def test_failures_have_their_reason(tmp_path: Path) -> None:
    images = [
        str(tmp_path / "absent.jpg"),
        12,
        np.zeros((2, 2, 3), np.float32),
        tmp_path,
        "x\0y.jpg",
        None,
        {"bytes": None, "path": None},
        "http://127.0.0.1:1/a.jpg",
    ]
    says = ["absent.jpg", "12 is no picture", "float32", "directory", "null byte", *["its image is empty"] * 2, "a.jpg"]
    table: list[dict[str, Any]] = [{"image": image} for image in [corpus.jpeg(1), *images]]
    table += [{}, {"caption": "no image"}, {"image": None, "error_message": "HTTP 404\nnot found " + "x" * 1000}]
    says += [*["it has no column 'image'"] * 2, "HTTP 404 not found xxx"]
    retry = clip_batch.StorageConfig(storage_options={"retry_for": 0})
    done = embed_table(table, tmp_path / "out", PLAN, CPU, storage=retry)
    assert (done.rows, done.failures) == (1, {"missing_image": 11})
    found = failures(tmp_path / "out")
    assert [row["key"] for row in found] == [f"{n:012d}" for n in range(1, 12)]
    for row, what in zip(found, says, strict=True):
        assert row["message"].startswith("no member with an image extension (") and what in row["message"]
        assert len(row["message"]) <= 500 and "\n" not in row["message"]


def test_many_failures_are_not_told_one_by_one(tmp_path: Path) -> None:
    lines: list[str] = []
    table = [{"image": None} for _ in range(20)]
    embed_table([*rows(1), *table], tmp_path / "out", PLAN, CPU, progress=lines.append)
    assert len([line for line in lines if "has no picture" in line]) == tables.TOLD
    assert "20 rows have no picture, and will be listed as failed" in lines


@pytest.mark.parametrize("name", CAPTION_FIELDS)
def test_the_column_of_captions_is_found(name: str, tmp_path: Path) -> None:
    lines: list[str] = []
    table = [{"image": corpus.jpeg(1), "TEXT": "lower in rank", name: "a cat"}]
    embed_table(table, tmp_path / "out", PLAN, CPU, progress=lines.append)
    assert clip_batch.read(tmp_path / "out").to_table()["caption"].to_pylist() == ["a cat"]
    assert f"captions are in the column {name!r}" in lines


def test_captions_of_each_form(tmp_path: Path) -> None:
    forms: list[tuple[Any, str | None]] = [
        ("a cat", "a cat"),
        (["", " ", "a dog", "a pet"], "a dog"),
        (np.array(["a cow"]), "a cow"),
        (b"a hen", "a hen"),
        ([], None),
        (5, "5"),
        (np.float32(1.5), "1.5"),
        (True, "true"),
        ({"en": "a cat"}, None),
        (None, None),
        (float("nan"), None),
    ]
    table = [{"image": corpus.jpeg(1), "caption": form} for form, _ in forms]
    assert embed_table(table, tmp_path / "out", PLAN, CPU).rows == len(forms)
    read = clip_batch.read(tmp_path / "out").to_table()
    assert read["caption"].to_pylist() == [text for _, text in forms]
    kept = [str(value) for value in read["extra"].to_pylist()]
    assert "a pet" in kept[1] and "5" in kept[5] and "en" in kept[8], "what is no text stays in the metadata"


class Unprintable:
    def __str__(self) -> str:
        raise KeyError("a bug of its own")


def test_values_that_no_metadata_can_hold_are_left_out(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    lines: list[str] = []
    table = rows(3)
    table[1] |= {"mask": b"\xff", "nested": {"bytes": b"\xff", "path": "a.png"}, "loop": loop, "pairs": {(1, 2): 3}}
    table[2] |= {"mask": b"\xff", "set": {1}, "kind": dict, "bug": Unprintable(), "huge": 10**5000}
    done = embed_table(table, tmp_path / "out", PLAN, CPU, progress=lines.append)
    assert (done.rows, done.failures) == (3, {})
    assert clip_batch.read(tmp_path / "out").to_table()["width"].to_pylist() == [0, 1, 2]
    told = [line.split(": no metadata can hold the values of ") for line in lines if ": no metadata" in line]
    assert {column.split("'")[1]: int(rest.split()[0]) for column, rest in told} == {
        "mask": 2,
        "nested": 1,
        "loop": 1,
        "pairs": 1,
        "bug": 1,
        "huge": 1,
    }


def test_other_names_of_columns(tmp_path: Path) -> None:
    table = [{"photo": corpus.jpeg(1), "text": "a cat", "caption": "kept"}]
    embed_table(table, tmp_path / "out", PLAN, CPU, image="photo", caption="text")
    (row,) = clip_batch.read(tmp_path / "out").to_table().to_pylist()
    assert row["caption"] == "a cat" and "kept" in str(row["extra"])


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS", 2)
    plan = PlanConfig(model="fake:8", partition_samples=2)

    def stopped() -> Iterator[dict[str, Any]]:
        yield from rows(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_table(stopped(), tmp_path / "out", plan, CPU)
    assert not (tmp_path / "out" / "_clip_batch").exists()
    assert embed_table(rows(7), tmp_path / "out", plan, CPU).rows == 7
    commits = sorted((tmp_path / "out/_clip_batch/commits").iterdir())
    commits[1].unlink()
    kept = {commit.name: commit.stat().st_mtime_ns for commit in (commits[0], *commits[2:])}
    tars = {tar.name: tar.stat().st_mtime_ns for tar in (tmp_path / "out/samples").iterdir()}
    done = embed_table(iter(rows(7)), tmp_path / "out", plan, CPU)
    assert (done.rows, done.done) == (7, 4)
    now = {commit.name: commit.stat().st_mtime_ns for commit in (tmp_path / "out/_clip_batch/commits").iterdir()}
    assert kept.items() < now.items(), "what is committed stays"
    assert {tar.name: tar.stat().st_mtime_ns for tar in (tmp_path / "out/samples").iterdir()} == tars


def test_other_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS", 2)
    embed_table(rows(5), tmp_path / "out", PLAN, CPU)
    changed = rows(5)
    changed[1]["caption"] = "another"
    for others in (changed, rows(4), rows(7)):
        with pytest.raises(PlanError, match="name another output"):
            embed_table(others, tmp_path / "out", PLAN, CPU)
    corpus.good_tar(f"{tmp_path}/a.tar", 2)
    clip_batch.make_plan(tmp_path / "a.tar", tmp_path / "tars", PLAN)
    with pytest.raises(PlanError, match="has a plan of other input"):
        embed_table(rows(), tmp_path / "tars", PLAN, CPU)


@pytest.mark.parametrize(
    ("table", "options", "says"),
    [
        ("rows", {}, "rows is a str: give a table"),
        ({"image": []}, {}, "rows is a dict"),
        (5, {}, "rows is a int"),
        ([5], {}, "row 0 is a int: it must be a mapping"),
        ([*rows(2), "x"], {}, "row 2 is a str: it must be a mapping"),
        ([pa.RecordBatch.from_pylist(rows(3)), 5], {}, "row 3 is a int"),
        ([{"photo": b"x"}], {}, "row 0 has no column 'image': there are photo"),
        ([{}], {}, "row 0 has no column 'image': there are none"),
        ([{"image": b"x"}], {"caption": "text"}, "row 0 has no column 'text'"),
        ([{"image": b"x"}], {"plan": PlanConfig(input=["a.tar"])}, "leave input and format out"),
    ],
)
def test_what_is_no_table_is_refused(table: Any, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        embed_table(table, tmp_path / "out", **options)


def test_nothing_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row to embed"):
        embed_table([], tmp_path / "out", PLAN)


def test_rows_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows(8)), tmp_path / "a.parquet", row_group_size=4)
    done = embed_table(pq.ParquetFile(tmp_path / "a.parquet").iter_batches(3), tmp_path / "out", PLAN, CPU)
    assert done.rows == 8
