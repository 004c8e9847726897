"""Plans of Parquet files: what is told apart by looking, what plan says and refuses, and partitions of row groups."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clip_batch.config import EmbedConfig, PlanConfig
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.embed import embed
from clip_batch.embeddings.reader import open_embeddings
from clip_batch.embeddings.status import status
from clip_batch.embeddings.verify import verify_output
from clip_batch.errors import ConfigError, InputError
from clip_batch.plan.kinds import detect_format
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.plan.specs import expand_inputs
from clip_batch.storage.store import Store
from clip_batch.types import Plan
from tests import corpus, parquets


def plan(input: Any, out: Path, lines: list[str] | None = None, **options: Any) -> Plan:
    say = lines.append if lines is not None else None
    return make_plan(input, out, PlanConfig(model="fake:16", **options), progress=say)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for number in range(2):
        parquets.hugging_face(str(tmp_path / f"data/train-0000{number}-of-00002.parquet"), 30, 100 * number)
    return tmp_path / "data"


def test_a_folder_is_planned_embedded_and_verified(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    made = plan(folder, tmp_path / "out", lines, partition_samples=15)
    assert {"images: column image", "captions: column text"} <= set(lines)
    assert made.format == "parquet" and len(made.partitions) == 4
    assert sum(piece.samples or 0 for one in made.partitions for piece in one.slices) == 60
    assert made.fields == {"image.path": "string", "image_column": "string", "label": "int64", "row_group": "int64"}
    outcomes = embed(tmp_path / "out", EmbedConfig(batch_size=8))
    assert [outcome.rows for outcome in outcomes] == [20, 10, 20, 10]  # whole row groups
    store = Store(tmp_path / "out")
    assert verify_output(store, deep=True).ok
    assert status(store).rows == 60
    rows = open_embeddings(store, load_plan(store))
    table = pa.concat_tables(rows.read_metadata(0, 60))
    assert table["caption"].to_pylist() == [f"picture {100 * file + row}" for file in range(2) for row in range(30)]
    assert table["offset"].to_pylist() == [*range(30), *range(30)]
    assert not (rows.read_vectors("text", 0, 60) == 0).all(axis=1).any()
    assert plan(folder, tmp_path / "out", lines, partition_samples=15) == load_plan(store)
    assert lines[-1] == "unchanged"


def test_partitions_of_bytes_need_no_count(folder: Path, tmp_path: Path) -> None:
    size = sum(os.path.getsize(path) for path in folder.iterdir())
    made = plan(folder, tmp_path / "out", partition_bytes=str(size // 5))
    assert len(made.partitions) > 3
    embed(tmp_path / "out")
    report = verify_output(Store(tmp_path / "out"), deep=True)
    assert (report.ok, report.rows) == (True, 60)


def test_every_row_is_a_row_or_a_failure_with_its_reason(tmp_path: Path) -> None:
    """Null, empty and broken images, files of other schemas, broken files: all are counted, and verify agrees."""
    (folder := tmp_path / "data").mkdir()
    images = [corpus.jpeg(0), None, b"", b"\xff\xd8\xff broken", corpus.jpeg(1)]
    parquets.write(str(folder / "a.parquet"), {"image": parquets.structs(images), "text": [None, "b", "c", "d", " "]})
    parquets.img2dataset(str(folder / "b.parquet"), 3)
    parquets.write(str(folder / "c.parquet"), {"text": ["no", "images"]})
    parquets.write(str(folder / "d.parquet"), {"image": pa.array([], pa.binary())})
    whole = Path(parquets.hugging_face(str(folder / "e.parquet"), 5)).read_bytes()
    (folder / "e.parquet").write_bytes(whole[:-20])
    lines: list[str] = []
    plan(folder, tmp_path / "out", lines)
    assert any("column image (2 of 4 files)" in line for line in lines), lines
    [outcome] = embed(tmp_path / "out")
    store = Store(tmp_path / "out")
    report = verify_output(store, deep=True)
    assert report.ok, report.problems
    assert (outcome.rows, outcome.warnings) == (5, {"missing_caption": 2})
    expected = {"missing_image": 3, "undecodable_image": 2, "empty_shard": 1, "corrupt_parquet": 1}
    assert read_commits(store)[0].failed == expected


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"url": ["http://a/b.jpg"]}, {"format": "parquet"}, "end2end --urls downloads"),
        ({"text": ["a"]}, {"modalities": ["image"]}, "its columns are text: name another file, or --modalities text"),
        ({"text": ["a"]}, {"image_field": "jpg"}, "no column 'jpg'"),
        ({"n": [1]}, {}, "no column with images' bytes; its columns are n: name another file"),
        ({"n": [1]}, {"modalities": ["text"]}, "no column of captions: name one with --caption-field; its columns"),
        ({"jpg": [b"x"], "alt": ["a"]}, {"caption_field": "alter"}, "no column 'alter'.*with text are alt"),
        ({"a": [b"x"], "b": [b"y"]}, {}, "name one with --image-field$"),
        ({"a": [b"x"]}, {"image_field": "b"}, "no column 'b'"),
    ],
)
def test_files_without_the_columns_are_refused(
    tmp_path: Path, columns: Any, options: dict[str, Any], message: str
) -> None:
    path = parquets.write(str(tmp_path / "a.parquet"), columns)
    with pytest.raises(InputError, match=message):
        plan(path, tmp_path / "out", **options)


def test_input_is_told_apart_by_looking(folder: Path, tmp_path: Path) -> None:
    urls = parquets.write(str(tmp_path / "urls.parquet"), {"url": ["http://a/b.jpg"], "caption": ["a"]})
    captions = parquets.write(str(tmp_path / "captions.parquet"), {"caption": ["a"]})
    images = parquets.img2dataset(str(tmp_path / "images.parquet"), 2)
    looked = [
        urls,
        captions,
        images,
        str(folder),
        f"{folder}/*.parquet",
        f"{folder}/train-0000{{0..1}}-of-00002.parquet",
    ]
    assert [detect_format([one], {}) for one in looked] == ["urls", *["parquet"] * 5]
    assert detect_format([str(tmp_path / "gone.parquet")], {}) == "parquet"
    with pytest.raises(InputError, match="1 of 1 inputs missing"):
        expand_inputs([str(tmp_path / "gone.parquet")])
    corpus.good_tar(str(folder / "00000.tar"), 2)  # then the others are its side-cars
    assert detect_format([str(folder)], {}) == "tar"


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    tar = corpus.good_tar(str(tmp_path / "a.tar"), 2)
    with pytest.raises(InputError, match="is a tar: --format tar takes it"):
        plan(tar, tmp_path / "out", format="parquet")
    (tmp_path / "page.parquet").write_bytes(b"<html></html>")
    with pytest.raises(InputError, match="an HTML page"):
        plan(tmp_path / "page.parquet", tmp_path / "out", format="parquet")
    with pytest.raises(InputError, match="holds no Parquet file"):
        plan(os.path.dirname(corpus.__file__), tmp_path / "out", format="parquet")


def test_hidden_files_and_those_of_spark_are_passed_over(folder: Path) -> None:
    for name in ("_metadata.parquet", ".part.parquet", "_SUCCESS"):
        shutil.copy(next(folder.glob("*.parquet")), folder / name)
    inputs = expand_inputs([str(folder)])
    assert len(inputs.shards) == 2
    assert inputs.passed_over == {"parquet": 1, "no extension": 1, "hidden": 1}


def test_a_file_that_changed_fails_its_partition(folder: Path, tmp_path: Path) -> None:
    plan(folder, tmp_path / "out", partition_samples=100)
    parquets.hugging_face(str(folder / "train-00001-of-00002.parquet"), 29)
    [outcome] = embed(tmp_path / "out")
    assert outcome.state == "failed" and "was planned with" in outcome.error


def test_images_alone(folder: Path, tmp_path: Path) -> None:
    made = plan(folder, tmp_path / "out", modalities=["image"])
    embed(tmp_path / "out")
    store = Store(tmp_path / "out")
    assert verify_output(store, deep=True).ok
    assert store.list("text_emb") == []
    rows = open_embeddings(store, load_plan(store))
    assert pa.concat_tables(rows.read_metadata(0, 2))["caption"].to_pylist() == ["picture 0", "picture 1"]
    with pytest.raises(ConfigError, match="--modalities names nothing"):
        plan(folder, tmp_path / "other", modalities=[])
    both = plan(folder, tmp_path / "both")
    assert both.digest != made.digest


def test_captions_alone(tmp_path: Path) -> None:
    texts = ["a cat", None, " ", "a dog"] * 10
    path = parquets.write(str(tmp_path / "a.parquet"), {"sentence": texts, "n": list(range(40))})
    plan(path, tmp_path / "out", modalities=["text"], caption_field="sentence", partition_samples=10)
    outcomes = embed(tmp_path / "out", EmbedConfig(batch_size=4))
    assert [(one.rows, one.failed) for one in outcomes] == [(5, 5)] * 4
    store = Store(tmp_path / "out")
    assert verify_output(store, deep=True).ok
    assert [commit.failed for commit in read_commits(store).values()] == [{"missing_caption": 5}] * 4
    assert store.list("img_emb") == []
    rows = open_embeddings(store, load_plan(store))
    assert np.allclose(np.linalg.norm(rows.read_vectors("text", 0, 20), axis=1), 1, atol=0.01)
    table = pa.concat_tables(rows.read_metadata(0, 20))
    assert table["caption"].to_pylist() == ["a cat", "a dog"] * 10
    assert table["n"].to_pylist() == [row for row in range(40) if row % 4 in (0, 3)]


def test_captions_alone_of_tars_and_folders(tmp_path: Path) -> None:
    files = [("a.txt", b"a"), ("b.txt", b"b"), ("b.jpg", b"no image"), ("c.json", b"{}"), ("d.txt", b" ")]
    tar = corpus.write_tar(str(tmp_path / "a.tar"), files)
    (tmp_path / "folder").mkdir()
    for name, data in files:
        (tmp_path / "folder" / name).write_bytes(data)
    for input, format in ((tar, "tar"), (str(tmp_path / "folder"), "files")):
        out = tmp_path / f"out-{format}"
        plan(input, out, format=format, modalities=["text"])
        [outcome] = embed(out)
        assert (outcome.rows, outcome.failed, outcome.passed_over) == (2, 2, {})
        assert verify_output(Store(out), deep=True).ok


@pytest.mark.parametrize("spec", ["", "/**/*.parquet"])
def test_an_output_in_a_folder_of_parquet_files_is_refused(folder: Path, tmp_path: Path, spec: str) -> None:
    """Its metadata would be input of the next plan."""
    with pytest.raises(ConfigError, match=r"data/out lies in the input folder .*/data, so that what is written would"):
        plan(f"{folder}{spec}", folder / "out")
    assert not (folder / "out").exists()
    plan(f"{folder}/*.parquet", folder / "out")


def test_a_column_of_paths_that_is_named_image_is_refused(tmp_path: Path) -> None:
    path = parquets.write(str(tmp_path / "a.parquet"), {"Image": ["a.jpg", "b.jpg"], "caption": ["a cat", "a dog"]})
    with pytest.raises(InputError, match=r"column 'Image' has string, as of paths, .*embed_table.*--modalities text"):
        plan(path, tmp_path / "out")
    with pytest.raises(InputError, match="column 'Image' has string"):
        plan(path, tmp_path / "out", caption_field="caption")
    assert plan(path, tmp_path / "out", modalities=["text"]).modalities == ("text",)
    assert plan(path, tmp_path / "own", caption_field="Image").modalities == ("text",)


@pytest.mark.parametrize(("column", "options"), [("text", {}), ("words", {"caption_field": "words"})])
def test_captions_without_images_are_embedded_alone(tmp_path: Path, column: str, options: dict[str, Any]) -> None:
    path = parquets.write(str(tmp_path / "a.parquet"), {column: ["a cat", "a dog"]})
    lines: list[str] = []
    made = plan(path, tmp_path / "out", lines, **options)
    assert made.modalities == ("text",) and "captions: column " + column in lines
    assert "no column of images: the captions alone are embedded, as with --modalities text" in lines
    [outcome] = embed(tmp_path / "out")
    assert (outcome.rows, outcome.failed) == (2, 0)
    assert plan(path, tmp_path / "out", lines, **options) == made
    assert plan(path, tmp_path / "out", lines, modalities=["text"], **options) == made
