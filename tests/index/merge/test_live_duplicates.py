"""`merge --add --dedup`: new rows are compared with the rows of the live version, and the share found is measured."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.config import MergeConfig, StorageConfig
from clip_batch.embeddings import reader
from clip_batch.embeddings.outputs import Outputs
from clip_batch.index.ann import faiss_index
from clip_batch.index.manifest import Manifest
from clip_batch.index.merge import duplicate_share, live_duplicates, train
from clip_batch.index.merge.duplicates import Duplicates
from clip_batch.index.merge.live_duplicates import LiveRows
from clip_batch.index.merge.merge import merge
from clip_batch.index.remove import remove_values
from clip_batch.plan.plan import load_plan
from clip_batch.search.searcher import Searcher
from clip_batch.storage.store import Store
from tests.fabricated import Vectors, clustered, commit, make_out, unit
from tests.servers.s3_server import BUCKET, S3
from tests.servers.s3_server import s3 as s3
from tests.servers.s3_server import s3_server as s3_server

CONFIG = MergeConfig(queries=20, shard_rows=300, dedup=0.97)
NONE = np.empty(0, dtype=np.int64)
LISTS = replace(CONFIG, index_key="IVF8,Flat", train_rows=400)
KINDS = {
    "flat": replace(CONFIG, index_key="Flat"),
    "lists": LISTS,
    "single": replace(LISTS, layout="single"),
    "reranked": replace(LISTS, index_key="IVF8,SQ8", rerank=2),
    "codes": replace(LISTS, index_key="IVF8,SQ8"),
    "graph": replace(LISTS, index_key="HNSW16"),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss_index.use_threads(1)


def half(vectors: Vectors) -> Vectors:
    return vectors.astype(np.float16).astype(np.float32)


def old_and_new() -> tuple[Vectors, Vectors]:
    """800 rows, and 300 new ones: 50 equal old ones, 50 are near old ones, 20 equal an earlier new one."""
    old, new = half(clustered(800, 16, 300, spread=1.0)[0]), half(clustered(300, 16, 300, seed=9, spread=1.0)[0])
    new[:50] = old[:50]
    new[50:100] = half(unit(old[100:150] + 0.02 * np.random.default_rng(5).standard_normal((50, 16))))
    new[120:140] = new[200:220]
    return old, new


def outs(folder: Path) -> tuple[str, str]:
    for name, images, sizes in zip("ab", old_and_new(), ([300, 500], [100, 200]), strict=True):
        make_out(folder / name, images, images, sizes)
    return str(folder / "a"), str(folder / "b")


def report(index: Path | str, made: Manifest) -> list[dict[str, Any]]:
    return pq.read_table(Path(index) / made.duplicates["file"]).to_pylist()


@pytest.mark.parametrize(
    "kind", ["lists", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "lists")]
)
def test_new_rows_that_repeat_live_ones_are_left_out(tmp_path: Path, kind: str) -> None:
    config, index, (old, new) = KINDS[kind], tmp_path / "index", outs(tmp_path)
    base = merge(old, index, config)
    assert base.rows == 800
    lines: list[str] = []
    made = merge(new, index, replace(config, add=True), progress=lines.append)
    found = made.duplicates
    assert (made.rows, found["rows"], found["live"], found["removed"], found["unknown"]) == (980, 120, 100, 0, 0)
    assert (found["sample"], found["pairs"], found["found"]) == (300, 120, 120)
    assert "100.0% of the duplicates are found, 120 of 120, by exact search for a sample of 300 rows" in lines
    assert f"100 of them repeat rows of index version {base.version}" in lines
    images, rows = old_and_new()[0], report(index, made)
    with Searcher(str(index)) as searcher:
        for place, row in enumerate(rows[:100]):
            twin = place if place < 50 else place + 50
            (stands,) = searcher.metadata([row["kept_id"]])
            names = ("key", "shard", "offset", "partition", "row")
            assert [stands[name] for name in names] == [row[f"kept_{name}"] for name in names]
            assert (row["kept_partition"], row["kept_row"]) == ((0, twin) if twin < 300 else (1, twin - 300))
            assert (row["output"], row["kept_output"], row["group"]) == (new, old, place)
            assert row["reason"] == (
                "equal to a row of the index"
                if place < 50
                else f"cosine {row['score']:.4f} >= 0.97, a row of the index"
            )
            own = old_and_new()[1][place]
            assert row["score"] == pytest.approx(float(unit(own[None])[0] @ unit(images[twin][None])[0]), abs=1e-6)
    assert {(row["kept_id"], row["reason"]) for row in rows[100:]} == {(None, "equal to an earlier row")}
    again = merge(new, index, replace(config, add=True))
    assert again == made


@pytest.mark.slow
def test_an_index_in_a_bucket(tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage, (old, new) = StorageConfig(s3.options), outs(tmp_path)
    for kind in ("single", "codes"):
        index = f"s3://{BUCKET}/{uuid.uuid4().hex}"
        merge(old, index, KINDS[kind], storage=storage)
        made = merge(new, index, replace(KINDS[kind], add=True), storage=storage)
        assert (made.rows, made.duplicates["live"], made.duplicates["pairs"]) == (980, 100, 120), kind


@pytest.mark.slow
def test_only_equal_rows_at_a_threshold_of_one(tmp_path: Path) -> None:
    old, new = outs(tmp_path)
    for kind in ("lists", "reranked", "codes"):
        config = replace(KINDS[kind], dedup=1.0)
        merge(old, tmp_path / kind, config)
        made = merge(new, tmp_path / kind, replace(config, add=True))
        assert [row["row"] for row in report(tmp_path / kind, made)[:50]] == [*range(50)]
        assert made.duplicates["rows"] == made.duplicates["pairs"] == 70, kind


def test_codes_alone_prove_nothing(tmp_path: Path) -> None:
    index, (old, new) = tmp_path / "index", outs(tmp_path)
    merge(old, index, KINDS["codes"])
    shutil.rmtree(old)
    lines: list[str] = []
    made = merge(new, index, replace(KINDS["codes"], add=True), progress=lines.append)
    found = made.duplicates
    assert (made.rows, found["rows"], found["live"], found["unknown"]) == (1080, 20, 0, 300)
    assert any(line.startswith("300 rows could not be compared with some rows of the index") for line in lines)


def test_an_out_that_has_grown_since_has_the_vectors_still(tmp_path: Path) -> None:
    images = np.concatenate(old_and_new())
    plan = make_out(tmp_path / "out", images, images, [300, 500, 300], skip=[2])
    config = replace(KINDS["codes"], allow_partial=True)
    assert merge(tmp_path / "out", tmp_path / "index", config).rows == 800
    commit(tmp_path / "out", plan, 2, images[800:], images[800:])
    made = merge(tmp_path / "out", tmp_path / "index", replace(config, add=True))
    assert (made.rows, made.duplicates["live"], made.duplicates["unknown"]) == (980, 100, 0)


def test_a_part_that_was_embedded_anew_has_other_vectors(tmp_path: Path) -> None:
    index, (old, new) = tmp_path / "index", outs(tmp_path)
    merge(old, index, KINDS["codes"])
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file() and "commits" in str(path):
            path.unlink()
    commit(old, load_plan(Store(old)), 0, old_and_new()[0][300:600], old_and_new()[0][300:600])
    made = merge(new, index, replace(KINDS["codes"], add=True))
    assert (made.duplicates["live"], made.duplicates["unknown"]) == (0, 300)


def test_captions_that_are_missing_repeat_nothing_of_the_index(tmp_path: Path) -> None:
    (old, new), config = old_and_new(), replace(KINDS["flat"], modalities=["text"])
    old[::3], new[50:80] = 0, 0
    make_out(tmp_path / "a", unit(old + 1), old, [800])
    make_out(tmp_path / "b", unit(new + 1), new, [300])
    merge(tmp_path / "a", tmp_path / "index", config)
    made = merge(tmp_path / "b", tmp_path / "index", replace(config, add=True))
    twins = [row for row in range(50) if row % 3] + [row for row in range(80, 100) if (row + 50) % 3]
    assert [row["row"] for row in report(tmp_path / "index", made) if row["kept_id"] is not None] == twins


def test_a_copy_of_a_removed_row_is_left_out_and_said(tmp_path: Path) -> None:
    index, (old, new) = tmp_path / "index", outs(tmp_path)
    merge(old, index, LISTS)
    remove_values(index, [f"0-{row}" for row in range(40)])
    made = merge(new, index, replace(LISTS, add=True))
    assert (made.duplicates["live"], made.duplicates["removed"]) == (100, 40)
    reasons = [row["reason"] for row in report(index, made)]
    assert reasons[:50] == ["equal to a removed row of the index"] * 40 + ["equal to a row of the index"] * 10


def test_rows_that_were_replaced_are_not_compared(tmp_path: Path) -> None:
    index, (old, new) = Store(str(tmp_path / "index")), outs(tmp_path)
    base = merge(old, index.url, LISTS)
    source = Outputs((reader.open_embeddings(Store(new), load_plan(Store(new))),))
    for replaced, count in ((NONE, 100), (np.arange(800), 0)):
        live = LiveRows(index, base, "image", NONE, replaced)
        assert len(live_duplicates.find(source, live, 0.97, NONE, print)[0].rows) == count


def test_where_every_row_repeats_a_live_one_nothing_is_added(tmp_path: Path) -> None:
    index, (old, _) = tmp_path / "index", outs(tmp_path)
    base = merge(old, index, LISTS)
    make_out(tmp_path / "copy", old_and_new()[0][200:500], old_and_new()[0][200:500], [300])
    for _ in range(2):
        assert merge(tmp_path / "copy", index, replace(LISTS, add=True)) == base


def test_what_is_missed_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, new = outs(tmp_path)
    source = Outputs((reader.open_embeddings(Store(new), load_plan(Store(new))),))
    rows = np.arange(205, 220)  # five of the twenty that repeat earlier ones were missed
    found = Duplicates(rows, rows - 80, np.ones(15, np.float32), np.zeros(15, dtype=np.bool_))
    share = duplicate_share.measure(source, "image", found, 0.97, NONE)
    assert share == (300, 20, 15) and share.share == 0.75
    share = duplicate_share.measure(source, "image", found, 0.97, np.arange(200, 203))
    assert share == (297, 17, 15)
    monkeypatch.setattr(duplicate_share, "BLOCK", 60)
    monkeypatch.setattr(duplicate_share, "MOST_ROWS", 180)
    assert duplicate_share.measure(source, "image", found, 0.97, NONE).pairs in (15, 15 + round(5 * 300 / 180))
    nothing = Duplicates(NONE, NONE, np.empty(0, np.float32), np.empty(0, np.bool_))
    assert duplicate_share.measure(source, "image", nothing, 1.0, NONE).share is None


@pytest.mark.slow
def test_misses_among_live_rows_are_measured(tmp_path: Path) -> None:
    old, new = outs(tmp_path)
    source = Outputs((reader.open_embeddings(Store(new), load_plan(Store(new))),))
    nothing = Duplicates(NONE, NONE, np.empty(0, np.float32), np.empty(0, np.bool_))
    for kind in ("flat", "reranked", "codes"):
        base = merge(old, tmp_path / kind, KINDS[kind])
        for gone, missed in ((NONE, 120), (np.arange(800), 20)):
            live = LiveRows(Store(str(tmp_path / kind)), base, "image", NONE, gone)
            assert duplicate_share.measure(source, "image", nothing, 0.97, NONE, live) == (300, missed, 0), kind


def test_lists_find_nearly_all_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "FEW_ROWS", 100)
    index, (old, new) = tmp_path / "index", outs(tmp_path)
    merge(old, index, LISTS)
    made = merge(new, index, replace(LISTS, add=True))
    assert made.duplicates["found"] >= 0.98 * made.duplicates["pairs"] == pytest.approx(0.98 * 120)


@pytest.mark.slow
@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(4, 40), min_size=1, max_size=3),
    threshold=st.sampled_from([0.8, 0.95, 1.0]),
    key=st.sampled_from(["Flat", "IVF2,Flat"]),
    seed=st.integers(0, 10_000),
)
def test_merges_and_additions_are_as_the_plain_model(sizes: list[int], threshold: float, key: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = unit(rng.standard_normal((sum(sizes), 6)))
    for row in range(1, len(images)):
        if rng.random() < 0.5:
            step = rng.choice([0, 0.1, 0.4])
            images[row] = unit((images[rng.integers(row)] + step * rng.standard_normal(6))[None])[0]
    images = half(images)
    exact = unit(images.astype(np.float64)).astype(np.float64)
    kept: list[int] = []
    for row in range(len(images)):
        equal = any(np.array_equal(images[row], images[other]) for other in kept)
        if not equal and not (threshold < 1 and (exact[kept] @ exact[row] >= threshold).any()):
            kept.append(row)
    config = MergeConfig(queries=2, shard_rows=25, index_key=key, train_rows=4, dedup=threshold)
    with tempfile.TemporaryDirectory() as folder:
        start = 0
        for number, size in enumerate(sizes):
            part = images[start : start + size]
            make_out(f"{folder}/{number}", part, part, [size])
            made = merge(f"{folder}/{number}", f"{folder}/index", replace(config, add=number > 0))
            start += size
        firsts = dict(zip((f"{folder}/{number}" for number in range(len(sizes))), np.cumsum([0, *sizes]), strict=False))
        with Searcher(f"{folder}/index") as searcher:
            rows = searcher.metadata(np.arange(made.rows))
            origin = [made.sources[shard.source].output for shard in made.shards for _ in range(shard.rows)]
        assert sorted(firsts[output] + row["row"] for output, row in zip(origin, rows, strict=True)) == kept
