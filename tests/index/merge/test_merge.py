from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clip_batch.cli import main
from clip_batch.config import MergeConfig
from clip_batch.embeddings.commits import read_commits
from clip_batch.errors import ConfigError, CorruptError, IncompleteError
from clip_batch.index.ann import clusters, faiss_index
from clip_batch.index.ann.footprint import served_bytes
from clip_batch.index.manifest import Manifest, load_manifest
from clip_batch.index.merge import choose
from clip_batch.index.merge import merge as stage
from clip_batch.index.merge import shard as shard_stage
from clip_batch.index.merge.job import MergeJob, open_job
from clip_batch.index.merge.merge import merge
from clip_batch.index.verify import verify_index
from clip_batch.search.searcher import Searcher
from clip_batch.storage.paths import TEMPORARY
from clip_batch.storage.store import Store, file_digest
from tests import corpus, fabricated
from tests.fabricated import clustered, make_out, unit

CONFIG = MergeConfig(queries=20)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny data: threads only wait for each other, badly so on a busy machine."""
    faiss_index.use_threads(1)


def file_of_template(index: Path, manifest: Manifest, name: str) -> str:
    record = json.loads((index / manifest.version / "template/record.json").read_text())
    return f"{manifest.version}/template/{record['attempt']}/{name}"


def half(vectors: np.ndarray) -> np.ndarray:
    """Vectors as OUT stores them, and merge reads them."""
    return unit(vectors.astype(np.float16).astype(np.float32))


def keys(images: np.ndarray, sizes: list[int]) -> list[str]:
    return [f"{part}-{row}" for part, size in enumerate(sizes) for row in range(size)]


@settings(max_examples=12)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(sum),
    shard_rows=st.integers(20, 160),
    gaps=st.booleans(),
    key=st.sampled_from(["auto", "IVF1,Flat"]),
    seed=st.integers(0, 99),
)
@example(sizes=[2, 0, 3], shard_rows=1, gaps=True, key="auto", seed=0)
def test_every_row_finds_itself(sizes: list[int], shard_rows: int, gaps: bool, key: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, texts = (unit(rng.standard_normal((sum(sizes), 12))) for _ in range(2))
    if gaps:
        texts[rng.random(len(texts)) < 0.4] = 0
    with tempfile.TemporaryDirectory() as folder:
        make_out(f"{folder}/out", images, texts, sizes)
        manifest = merge(f"{folder}/out", f"{folder}/index", replace(CONFIG, shard_rows=shard_rows, index_key=key))
        assert manifest.rows == sum(shard.rows for shard in manifest.shards) == len(images)
        assert max(shard.rows for shard in manifest.shards) <= shard_rows
        assert [shard.offset for shard in manifest.shards] == np.cumsum([0, *(s.rows for s in manifest.shards)])[
            :-1
        ].tolist()
        names = keys(images, sizes)
        with Searcher(f"{folder}/index") as searcher:
            found = searcher.search(images, k=1)
            assert [line[0].metadata["key"] for line in found] == names
            if texts.any():
                captioned = np.flatnonzero(texts.any(axis=1))
                found = searcher.search(texts[captioned], k=1, modality="text")
                assert [line[0].metadata["key"] for line in found] == [names[row] for row in captioned]
                # what has no vector is never found, and comes back as zero
                assert len(searcher.search(texts[captioned[0]], k=1000, modality="text")[0]) == len(captioned)
            # id, vector, metadata and lineage speak of one row
            rows = searcher.metadata(np.arange(manifest.rows))
            assert sorted(row["key"] for row in rows) == sorted(names)
            assert all(row["key"] == f"{row['partition']}-{row['row']}" and row["n"] == row["row"] for row in rows)
            place = [names.index(row["key"]) for row in rows]
            for modality, vectors in (("image", images), ("text", texts))[: len(manifest.key)]:
                stored = searcher.reconstruct(np.arange(manifest.rows), modality)
                np.testing.assert_allclose(stored, vectors[place], atol=1e-3)


@settings(max_examples=10)
@given(parts=st.integers(1, 6), shard_rows=st.integers(30, 200), k=st.integers(1, 30), seed=st.integers(0, 99))
def test_the_cut_into_parts_and_shards_never_changes_the_answers(
    parts: int, shard_rows: int, k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    images, texts = clustered(150, 16, 5, seed)
    queries = unit(rng.standard_normal((7, 16)))
    sizes = np.diff([0, *sorted(rng.integers(0, 151, parts - 1)), 150]).tolist()
    with tempfile.TemporaryDirectory() as folder:
        make_out(f"{folder}/out", images, texts, sizes)
        merge(f"{folder}/out", f"{folder}/index", replace(CONFIG, shard_rows=shard_rows))
        exact = queries @ half(images).T
        names = np.array(keys(images, sizes))
        with Searcher(f"{folder}/index") as searcher:
            for line, scores in zip(searcher.search(queries, k), exact, strict=True):
                best = np.argsort(-scores, kind="stable")[:k]
                np.testing.assert_allclose([hit.score for hit in line], scores[best], atol=1e-5)
                assert {hit.metadata["key"] for hit in line} == set(names[best])


def test_manifest_says_what_is_there(tmp_path: Path) -> None:
    images, texts = clustered(300, 8, 10)
    plan = make_out(tmp_path / "out", images, texts, [100, 0, 200])
    manifest = merge(str(tmp_path / "out"), str(tmp_path / "index"), replace(CONFIG, shard_rows=100))
    assert manifest == load_manifest(Store(str(tmp_path / "index"))) == Manifest.from_json(manifest.to_json())
    assert manifest.encoder == fabricated.ENCODER
    assert manifest.plan == plan.digest
    assert manifest.key == {"image": "Flat", "text": "Flat"}
    assert manifest.effort == {"image": None, "text": None}
    assert manifest.missing == ()
    for kinds in manifest.recall.values():
        for line in kinds.values():
            assert line == {
                **{"1": 1.0, "10": 1.0, "100": 1.0, "interval_10": 0.0, "interval_100": 0.0},
                "queries": 20.0,
            }
    assert [shard.name for shard in manifest.shards] == ["0000", "0001", "0002"]
    for shard in manifest.shards:
        assert set(shard.files) == {
            f"{folder}/{shard.name}{end}"
            for folder, end in (("image", ".index"), ("text", ".index"), ("metadata", ".arrow"))
        }
        for name, entry in shard.files.items():
            path = tmp_path / "index" / manifest.version / name
            assert entry == {"bytes": path.stat().st_size, "sha256": file_digest(str(path))}
    with pa.memory_map(str(tmp_path / "index" / manifest.version / "metadata/0000.arrow")) as file:
        schema = pa.ipc.open_file(file).schema
    assert schema.names == ["key", "shard", "offset", "length", "caption", "n", "extra", "partition", "row"]


def test_the_rows_of_a_cluster_lie_together(tmp_path: Path) -> None:
    """Sorted by list: neighbours are neighbours on disk, for a Flat index too."""
    images, texts = clustered(2000, 16, 8, spread=0.2)
    make_out(tmp_path / "out", images, texts, [1000, 1000])
    merge(str(tmp_path / "out"), str(tmp_path / "index"), CONFIG)
    with Searcher(str(tmp_path / "index")) as searcher:
        _, ids = searcher.search_ids(images[:50], 20)
    blocks = [len(set(line // 64)) for line in ids]
    assert np.mean(blocks) < 8  # of 32; about 15 in an arbitrary order


@pytest.mark.parametrize("sizes", [[1], [2], [0, 3, 0]])
def test_very_few_rows(tmp_path: Path, sizes: list[int]) -> None:
    images, texts = clustered(sum(sizes), 8, 3)
    make_out(tmp_path / "out", images, texts, sizes)
    manifest = merge(str(tmp_path / "out"), str(tmp_path / "index"), CONFIG)
    assert manifest.recall["image"]["text"]["10"] == 1.0
    assert ("image" in manifest.recall["image"]) == (sum(sizes) > 1)  # a lone row has no neighbour but itself
    with Searcher(str(tmp_path / "index")) as searcher:
        assert [len(line) for line in searcher.search(images, k=10)] == [sum(sizes)] * sum(sizes)


def test_no_caption_at_all_leaves_the_text_index_out(tmp_path: Path) -> None:
    images, texts = clustered(30, 8, 3)
    make_out(tmp_path / "out", images, np.zeros_like(texts), [30])
    manifest = merge(str(tmp_path / "out"), str(tmp_path / "index"), CONFIG)
    assert list(manifest.key) == ["image"]
    with pytest.raises(ConfigError, match="no vectors of text"):
        merge(str(tmp_path / "out"), str(tmp_path / "index"), replace(CONFIG, modalities=["text"]))


def test_incomplete_is_refused_or_recorded(tmp_path: Path) -> None:
    images, texts = clustered(50, 8, 3)
    make_out(tmp_path / "out", images, texts, [10] * 5, skip=[1, 2, 4])
    with pytest.raises(
        IncompleteError, match=r"partitions 1-2,4 of 5: run clip-batch worker --output .*/out --partitions 1-2,4"
    ):
        merge(str(tmp_path / "out"), str(tmp_path / "index"), CONFIG)
    assert not (tmp_path / "index").exists()
    manifest = merge(str(tmp_path / "out"), str(tmp_path / "index"), replace(CONFIG, allow_partial=True))
    assert manifest.missing == (1, 2, 4)
    assert manifest.rows == 20


def test_nothing_embedded_is_refused(tmp_path: Path) -> None:
    make_out(tmp_path / "out", np.zeros((0, 8), np.float32), np.zeros((0, 8), np.float32), [0, 0])
    with pytest.raises(CorruptError, match="no embedded row"):
        merge(str(tmp_path / "out"), str(tmp_path / "index"), CONFIG)


def test_a_commit_of_another_encoder_or_dimension_is_refused(tmp_path: Path) -> None:
    images, texts = clustered(20, 8, 3)
    for name, change, what in (("a", {"encoder": "f" * 16}, "encoder"), ("b", {}, "dimension")):
        out = tmp_path / name
        plan = make_out(out, images, texts, [10, 10], skip=[1])
        wide = clustered(10, 8 if change else 16, 3)
        fabricated.commit(out, plan, 1, *wide, **change)
        with pytest.raises(CorruptError, match=f"partition 1 has {what}"):
            merge(str(out), str(tmp_path / "index"), CONFIG)


def damage_nan(vectors: np.ndarray) -> np.ndarray:
    vectors[7, 3] = np.nan
    return vectors


def damage_inf(vectors: np.ndarray) -> np.ndarray:
    vectors[7, 3] = np.inf
    return vectors


def damage_norm(vectors: np.ndarray) -> np.ndarray:
    vectors[7] *= 1.02
    return vectors


def damage_zero(vectors: np.ndarray) -> np.ndarray:
    vectors[7] = 0
    return vectors


DAMAGES = {
    damage_nan: "row 7 has norm nan",
    damage_inf: "row 7 has norm inf",
    damage_norm: r"row 7 has norm 1\.0[12]",
    damage_zero: "row 7 has norm 0",
    lambda vectors: vectors.astype(np.float32): "is float32",
    lambda vectors: vectors[:-1]: r"\(9, 8\), the commit says float16 \(10, 8\)",
    lambda vectors: np.asfortranarray(vectors): "Fortran order",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("folder", ["img_emb", "text_emb"])
@pytest.mark.parametrize("queries", [1, 1000])
def test_damaged_vectors_are_refused_by_file_and_row(tmp_path: Path, damage: object, folder: str, queries: int) -> None:
    images, texts = clustered(20, 8, 3)
    make_out(tmp_path / "out", images, texts, [10, 10])
    path = read_commits(Store(str(tmp_path / "out")))[1].file(folder)
    assert path
    np.save(tmp_path / "out" / path, damage(np.load(tmp_path / "out" / path)))  # type: ignore[operator]
    with pytest.raises(CorruptError, match=f"{path}.*{DAMAGES[damage]}"):  # type: ignore[index]
        merge(str(tmp_path / "out"), str(tmp_path / "index"), replace(CONFIG, queries=queries, train_rows=1))
    assert not (tmp_path / "index/CURRENT").exists()


def test_few_captions_are_not_tuned_by(tmp_path: Path) -> None:
    images, texts = clustered(4000, 32, 200)
    texts[np.arange(len(texts)) >= 24] = 0
    make_out(tmp_path / "out", images, texts, [4000])
    config = replace(CONFIG, modalities=["image"], queries=200, index_key="IVF64,SQ8")
    lines: list[str] = []
    manifest = merge(str(tmp_path / "out"), str(tmp_path / "index"), config, progress=lines.append)
    efforts = manifest.efforts["image"]
    assert manifest.recall["image"]["text"]["queries"] < 10
    assert all(efforts["text"][k] >= efforts["image"][k] for k in ("10", "100"))
    assert any("text queries: recall@10" in line and line.endswith("queries only") for line in lines)
    assert not any("image queries" in line and "only" in line for line in lines)


def test_a_finished_version_that_lost_a_file_is_built_anew(tmp_path: Path) -> None:
    images, texts = clustered(300, 8, 3)
    make_out(tmp_path / "out", images, texts, [300])
    out, index = str(tmp_path / "out"), str(tmp_path / "index")
    first = merge(out, index, CONFIG)
    for damage in ("cut", "missing"):
        path = tmp_path / "index" / max(first.files, key=lambda name: first.files[name]["bytes"])
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-8])
        else:
            path.unlink()
        lines: list[str] = []
        assert merge(out, index, CONFIG, progress=lines.append).version == first.version
        assert any("is built anew" in line for line in lines)
        assert verify_index(Store(index), deep=True).problems == {}
    path.unlink()
    assert main(["merge", "--output", out, "--index", index, "--queries", str(CONFIG.queries)]) == 0
    assert verify_index(Store(index), deep=True).problems == {}, "the command does so too"
    assert any("finished already" in line for line in _progress(out, index)), "a sound one is not"


def _progress(out: str, index: str) -> list[str]:
    """The lines of a merge."""
    lines: list[str] = []
    merge(out, index, CONFIG, progress=lines.append)
    return lines


def test_cut_and_missing_files_are_refused(tmp_path: Path) -> None:
    images, texts = clustered(20, 8, 3)
    make_out(tmp_path / "out", images, texts, [20])
    commit = read_commits(Store(str(tmp_path / "out")))[0]
    for folder, text in (("metadata", "not readable"), ("img_emb", "is cut")):
        path = tmp_path / "out" / str(commit.file(folder))
        whole = path.read_bytes()
        path.write_bytes(whole[:-8])
        with pytest.raises(CorruptError, match=text):
            merge(str(tmp_path / "out"), str(tmp_path / "index"), CONFIG)
        path.unlink()
        with pytest.raises(CorruptError, match="No such file"):
            merge(str(tmp_path / "out"), str(tmp_path / "index"), CONFIG)
        path.write_bytes(whole)


def test_resume_builds_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = clustered(90, 8, 3)
    make_out(tmp_path / "out", images, texts, [45, 45])
    out, index, config = str(tmp_path / "out"), str(tmp_path / "index"), replace(CONFIG, shard_rows=30)
    real, done = shard_stage._fill, []

    def die(template: object, rows: np.ndarray, lists: np.ndarray | None) -> object:
        done.append(len(rows))
        if len(done) == 3:  # the second shard's image index
            raise KeyboardInterrupt
        return real(template, rows, lists)

    monkeypatch.setattr(shard_stage, "_fill", die)
    with pytest.raises(KeyboardInterrupt):
        merge(out, index, config)
    monkeypatch.setattr(shard_stage, "_fill", real)
    job = open_job(out, index, config)
    assert Store(index).list(f"{job.version}/shards") == ["0000.json"]
    with pytest.raises(IncompleteError, match="index shards 1-2 are not built"):
        stage.publish(job)
    with pytest.raises(ConfigError, match="no index at"):
        Searcher(index)
    times = {
        name: (tmp_path / "index" / job.version / name).stat().st_mtime_ns
        for name in ("template/record.json", "image/0000.index", "shards/0000.json")
    }
    stage.build_shard(job, 2)  # in any order
    manifest = merge(out, index, config)
    assert all((tmp_path / "index" / job.version / name).stat().st_mtime_ns == time for name, time in times.items())
    with Searcher(index) as searcher:
        found = searcher.search(images, k=1)
    assert [line[0].metadata["key"] for line in found] == keys(images, [45, 45])
    lines: list[str] = []
    assert merge(out, index, config, progress=lines.append) == manifest
    assert lines == [f"version {manifest.version} is finished already"]


def test_the_old_version_serves_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = clustered(60, 8, 3)
    out, index = str(tmp_path / "out"), str(tmp_path / "index")
    plan = make_out(out, images, texts, [30, 30], skip=[1])
    config = replace(CONFIG, allow_partial=True)
    old = merge(out, index, config)
    fabricated.commit(out, plan, 1, images[30:], texts[30:])

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            merge(out, index, config)
    with Searcher(index) as searcher:
        assert searcher.manifest == old
        assert len(searcher.search(images[0], k=100)[0]) == 30
        new = merge(out, index, config)
        assert new.version != old.version
        assert len(searcher.search(images[0], k=100)[0]) == 30  # what is open stays as it was
    assert Store(index).read("CURRENT").decode() == f"{new.version}\n"
    assert load_manifest(Store(index)).missing == ()
    # a merge with the options of a finished version only makes it live
    other = merge(out, index, replace(config, seed=1))
    assert load_manifest(Store(index)) == other != new
    assert merge(out, index, config) == new == load_manifest(Store(index))


def test_ivf_effort_is_tuned_for_the_target(tmp_path: Path) -> None:
    images, texts = clustered(4000, 32, 200)
    make_out(tmp_path / "out", images, texts, [2000, 2000])
    base = replace(CONFIG, queries=200, shard_rows=2500)
    low, high = (
        merge(
            str(tmp_path / "out"), str(tmp_path / "index"), replace(base, index_key="IVF16,SQ8", recall_target=target)
        )
        for target in (0.5, 0.95)
    )
    for manifest in (low, high):
        assert manifest.key == {"image": "IVF16,SQ8", "text": "IVF16,SQ8"}
        for kinds in manifest.recall.values():
            assert set(kinds) == {"image", "text"}
            assert all(line[k] >= manifest.recall_target for line in kinds.values() for k in ("10", "100"))
            assert all(line["queries"] == 200 for line in kinds.values())
    assert low.effort["image"] < high.effort["image"] <= 16  # type: ignore[operator]
    lines: list[str] = []
    exact = replace(base, index_key="IVF16,SQ4", recall_target=1.0)
    manifest = merge(str(tmp_path / "out"), str(tmp_path / "index"), exact, progress=lines.append)
    assert manifest.effort["image"] == 16
    assert any("no effort reaches a recall of 1.0" in line for line in lines)

    # the recorded recall is the recall that a search has: the same queries, outside
    with np.load(tmp_path / "index" / file_of_template(tmp_path / "index", high, "queries.npz")) as saved:
        rows = saved["text.rows"]
    merge(str(tmp_path / "out"), str(tmp_path / "index"), replace(base, index_key="IVF16,SQ8", recall_target=0.95))
    queries = half(texts[rows])
    best = np.argsort(-(queries @ half(images).T), axis=1)[:, :10]
    with Searcher(str(tmp_path / "index")) as searcher:
        hits = searcher.search(queries, k=10)
    found = [[hit.metadata["partition"] * 2000 + hit.metadata["row"] for hit in line] for line in hits]
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, best, strict=True)])
    assert abs(share - high.recall["image"]["text"]["10"]) < 0.005


@pytest.mark.usefixtures("autofaiss")
def test_auto_tries_its_keys_on_the_data(tmp_path: Path) -> None:
    images, texts = clustered(12_000, 32, 300)
    texts[::7] = 0
    make_out(tmp_path / "out", images, texts, [5000, 7000])
    manifest = merge(str(tmp_path / "out"), str(tmp_path / "index"), replace(CONFIG, flat_rows=1000, queries=200))
    assert manifest.key == {"image": "IVF128,PQ16x4fs", "text": "IVF128,PQ16x4fs"}
    assert manifest.rerank in choose.FACTORS
    for modality, kinds in manifest.recall.items():
        assert all(line[k] >= 0.95 for line in kinds.values() for k in ("10", "100"))
        (tried,) = manifest.tried[modality]
        assert (tried["key"], tried["rerank"] <= manifest.rerank) == ("IVF128,PQ16x4fs", True)
        assert set(tried["recall"]) == {"image", "text"}
        for by_k in manifest.efforts[modality].values():
            assert 1 <= by_k["10"] <= by_k["100"] <= (manifest.effort[modality] or 0) <= 128
    with Searcher(str(tmp_path / "index")) as searcher:
        assert len(searcher.search(images[0], k=12_000, modality="text", effort=128)[0]) == np.count_nonzero(
            texts.any(axis=1)
        )


def test_codes_that_confuse_the_data_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that differ in what 4 bits for 2 dimensions cannot say: the rule goes on to the next kind of codes."""
    clustered_as, clusterings = clusters.train, list[int]()
    monkeypatch.setattr(clusters, "train", lambda vectors, count, seed: (
        clusterings.append(count) or clustered_as(vectors, count, seed)))  # fmt: skip
    rng = np.random.default_rng(0)
    images = unit(np.ones((6000, 32)) + 1e-2 * rng.standard_normal((6000, 32)))
    make_out(tmp_path / "out", images, images, [6000])
    lines: list[str] = []
    config = replace(CONFIG, flat_rows=1000, queries=100, modalities=["image"])
    manifest = merge(str(tmp_path / "out"), str(tmp_path / "index"), config, progress=lines.append)
    keys = [one["key"] for one in manifest.tried["image"]]
    assert len(keys) == len(set(keys)) > 0
    assert manifest.key["image"] in keys
    worst = {one["key"]: min(by_k["100"] for by_k in one["recall"].values()) for one in manifest.tried["image"]}
    assert worst[manifest.key["image"]] == max(worst.values())
    assert sum(line.startswith("tried ") for line in lines) == len(keys) > 1
    assert len(clusterings) == 1, "the keys share their centroids"


def test_too_few_rows_for_a_codebook_are_flat_whatever_is_asked(tmp_path: Path) -> None:
    images, texts = clustered(12, 8, 3)
    make_out(tmp_path / "out", images, texts, [12])
    manifest = merge(str(tmp_path / "out"), str(tmp_path / "index"), replace(CONFIG, flat_rows=0))
    assert manifest.key == {"image": "Flat", "text": "Flat"}
    images, texts = clustered(1001, 8, 30)
    make_out(tmp_path / "more", images, texts, [1001])
    manifest = merge(str(tmp_path / "more"), str(tmp_path / "index2"), replace(CONFIG, flat_rows=0))
    assert manifest.key["image"].startswith("IVF32,")


def test_without_re_ranking_codes_find_the_rows_themselves(tmp_path: Path) -> None:
    images, texts = clustered(6000, 32, 300)
    make_out(tmp_path / "out", images, texts, [6000])
    config = replace(CONFIG, flat_rows=1000, queries=100, rerank=0)
    manifest = merge(str(tmp_path / "out"), str(tmp_path / "index"), config)
    assert manifest.rerank == 0
    assert manifest.key["image"] in ("IVF64,SQfp16", "IVF64,SQ8")
    assert not [name for name in manifest.files if name.endswith(".npy")]
    growing = merge(str(tmp_path / "out"), str(tmp_path / "index"), replace(config, rerank="auto", growing=True))
    assert growing.key["image"] == "RR32,IVF64,RaBitQfs"
    assert growing.rerank


def test_held_out_rows_are_not_trained_on_and_every_part_gives_its_share(tmp_path: Path) -> None:
    images, texts = clustered(1000, 8, 10)
    texts[::3] = 0
    make_out(tmp_path / "out", images, texts, [100, 300, 600])
    job = open_job(str(tmp_path / "out"), str(tmp_path / "index"), replace(CONFIG, queries=50))

    rows, drawn = job.source.draw("image", [100, 300, 600], 50, 0)
    assert np.bincount(np.digitize(rows, [100, 400])).tolist() == [5, 15, 30]
    np.testing.assert_array_equal(drawn, images.astype(np.float16)[rows])
    more, _ = job.source.draw("image", [100, 300, 600], 1000, 0, without=rows)
    assert sorted([*rows, *more]) == list(range(1000))
    captioned = [int(part.any(axis=1).sum()) for part in np.split(texts, [100, 400])]
    rows, drawn = job.source.draw("text", captioned, 60, 0)
    assert len(rows) == 60
    assert drawn.any(axis=1).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"index_key": "IVF16,Flat"}, r"IVF16,Flat.*on 2 training vectors.*need as many"),
        ({"index_key": "Nonsense"}, "index key 'Nonsense'"),
        ({"shard_rows": -1}, "shard_rows is -1: it must be a whole number, 0 or more"),
        ({"queries": 0}, "queries is 0: it must be a whole number between 1 and 100,000"),
        ({"dedup": 2}, "dedup is 2: it must be a number between 0 and 1"),
        ({"rerank": 99_999}, "rerank is 99999: it must be a whole number between 0 and 10,000, or auto"),
        ({"modalities": ["sound"]}, "modalities"),
        ({"recall_target": 95}, "recall_target"),
        ({"max_memory": "much"}, "max_memory is 'much': it must be a size"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, change: dict[str, object], text: str) -> None:
    images, texts = clustered(3, 8, 3)
    make_out(tmp_path / "out", images, texts, [3])
    with pytest.raises(ConfigError, match=text) as error:
        merge(str(tmp_path / "out"), str(tmp_path / "index"), replace(CONFIG, **change))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_key_for_many_rows_is_not_refused_for_few_captions(tmp_path: Path) -> None:
    images, texts = clustered(1000, 16, 10)
    texts[30:] = 0
    make_out(tmp_path / "out", images, texts, [1000])
    lines: list[str] = []
    for number, config in enumerate([replace(CONFIG, layout="single"), CONFIG]):
        index = str(tmp_path / f"index{number}")
        config = replace(config, index_key="IVF32,SQ8")
        manifest = merge(str(tmp_path / "out"), index, config, progress=lines.append)
        assert manifest.key == {"image": "IVF32,SQ8", "text": "Flat"}
        assert any("text: 30 rows are too few for index key IVF32,SQ8: Flat instead" in line for line in lines)
        with Searcher(index) as searcher:
            (hit,) = searcher.search(texts[7], 1, modality="text")[0]
            assert hit.metadata["row"] == 7
        assert verify_index(Store(index), deep=True).problems == {}


@pytest.mark.parametrize("gaps", [1, 2])
def test_the_memory_of_the_index_is_shared_by_the_kinds_that_have_vectors(tmp_path: Path, gaps: int) -> None:
    images, texts = clustered(3000, 32, 10)
    texts[::gaps] = 0
    make_out(tmp_path / "out", images, texts, [3000])
    memory = served_bytes("Flat", 3000, 32)  # enough for one index in full
    config = replace(CONFIG, index_memory=str(memory + 1000))
    key = merge(str(tmp_path / "out"), str(tmp_path / "index"), config).key
    assert key["image"] == "Flat" if gaps == 1 else key["image"].startswith("IVF"), key


def test_more_shards_than_anybody_can_search_are_refused(tmp_path: Path) -> None:
    images, texts = clustered(1000, 4, 3)
    make_out(tmp_path / "out", images, texts, [1000])
    with pytest.raises(
        ConfigError, match=r"334 index shards of 3 rows are too many to search, 100 of that .*: raise --shard-rows"
    ):
        merge(str(tmp_path / "out"), str(tmp_path / "index"), replace(CONFIG, shard_rows=3))


def test_an_unfinished_or_broken_manifest_is_not_read(tmp_path: Path) -> None:
    images, texts = clustered(10, 8, 3)
    make_out(tmp_path / "out", images, texts, [10])
    manifest = merge(str(tmp_path / "out"), str(tmp_path / "index"), CONFIG)
    store, name = Store(str(tmp_path / "index")), f"{manifest.version}/manifest.json"
    whole = store.read_json(name)
    for broken in (b"{", json.dumps({**whole, "format": 99}).encode(), b"[]"):
        store.replace(name, broken)
        with pytest.raises(CorruptError, match="is not a manifest"):
            load_manifest(store)
    whole["encoder"]["weights"] = "1" * 64
    store.replace(name, json.dumps(whole).encode())
    with pytest.raises(CorruptError, match="fingerprint"):
        load_manifest(store)
    store.remove(name)
    with pytest.raises(CorruptError, match="is missing"):
        load_manifest(store)


def test_a_remote_out_and_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images, texts = clustered(60, 8, 3)
    root = f"memory://{secrets.token_hex(4)}"
    make_out(f"{root}/out", images, texts, [20, 40])
    manifest = merge(f"{root}/out", f"{root}/index", replace(CONFIG, shard_rows=25))
    for _ in range(2):  # the second from the cache
        with Searcher(f"{root}/index") as searcher:
            assert [line[0].metadata["key"] for line in searcher.search(images, k=1)] == keys(images, [20, 40])
    store = Store(f"{root}/index")
    name = f"{manifest.version}/image/0001.index"
    data = bytearray(store.read(name))
    data[-1] ^= 1
    store.replace(name, bytes(data))
    next((tmp_path / "cache").rglob("image/0001.index")).unlink()
    with pytest.raises(CorruptError, match="sha256"):
        Searcher(f"{root}/index")


# Attempts at one task, at once, dying, or misled by the store. The rows' order is drawn anew by each
# attempt, as if by machines that round differently: files of two attempts would not fit together.

SIZES = [20, 23]
SMALL = replace(CONFIG, shard_rows=30)
TASKS: dict[str, Callable[[MergeJob], object]] = {
    "train": stage.train,
    "build_shard": lambda job: stage.build_shard(job, 0),
    "publish": stage.publish,
}


def _shuffled(rng: np.random.Generator, order: np.ndarray, lists: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    places = rng.permutation(len(order))
    return order[places], lists[places]


class Race:
    """An OUT, and an index whose tasks are disturbed at one point among their writes."""

    def __init__(self, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images, texts = clustered(sum(SIZES), 8, 3)
        self.out, self.root, self.act, self.left = f"{root}/out", root, lambda: None, -1
        self.index = ""
        make_out(self.out, self.images, texts, SIZES)
        rng = np.random.default_rng()
        real = shard_stage._order
        monkeypatch.setattr(shard_stage, "_order", lambda *given: _shuffled(rng, *real(*given)))
        for name in ("create", "replace", "rename", "remove_folder"):
            monkeypatch.setattr(Store, name, self._around(getattr(Store, name)))
        monkeypatch.setattr(Store, "writer", self._inside(Store.writer))

    def _point(self) -> None:
        self.left -= 1
        if self.left == -1:
            self.act()

    def _around(self, real: Callable[..., object]) -> Callable[..., object]:
        def disturbed(store: Store, *arguments: object) -> object:
            self._point()
            answer = real(store, *arguments)
            self._point()
            return answer

        return disturbed

    def _inside(self, real: Callable[..., object]) -> Callable[..., object]:
        @contextmanager
        def disturbed(store: Store, name: str) -> Iterator[IO[bytes]]:
            with real(store, name) as file:  # type: ignore[attr-defined]
                yield file
                self._point()
            self._point()

        return disturbed

    def job(self, task: str) -> MergeJob:
        """A new index, with all done that comes before the task."""
        self.index = f"{self.root}/index-{secrets.token_hex(4)}"
        job = open_job(self.out, self.index, SMALL)
        if task != "train":
            stage.train(job)
        if task == "publish":
            for shard in range(job.shards):
                stage.build_shard(job, shard)
        return job

    def merge(self) -> Manifest:
        return merge(self.out, self.index, SMALL)

    def disturb(self, task: str, act: Callable[[], object]) -> Iterator[None]:
        """Run the task with `act` at its first point, a new one with it at its second, and so on; yield after each."""
        for number in range(100):
            job, done = self.job(task), []
            self.act, self.left = lambda done=done: (done.append(1), act()), number
            with suppress(ConnectionError):
                TASKS[task](job)
            self.left = -1
            if not done:
                assert number >= 8  # the points that the lightest task has
                return
            yield
        raise AssertionError("the task never ends")

    def check(self) -> None:
        """The index is whole, ids, vectors and metadata are of one attempt, and nothing else is there."""
        store = Store(self.index)
        assert verify_index(store, deep=True).problems == {}
        with Searcher(self.index) as searcher:
            found = searcher.search(self.images, k=1)
            version = searcher.manifest.version
        assert [line[0].metadata["key"] for line in found] == keys(self.images, SIZES)
        attempt = store.read_json(f"{version}/template/record.json")["attempt"]
        template = {
            f"{attempt}/{name}"
            for name in ("centroids.npy", "held-0.parquet", "image.index", "queries.npz", "text.index")
        }
        wanted = {"manifest.json", *(f"template/{name}" for name in ("record.json", *template))}
        ends = {"image": "index", "text": "index", "metadata": "arrow", "truth": "npz", "shards": "json"}
        wanted |= {f"{name}/{shard}.{end}" for name, end in ends.items() for shard in ("0000", "0001")}
        names = [name for name in corpus.names_in(store) if TEMPORARY not in name]  # kill -9 leaves a record's spool
        assert names == sorted(["CURRENT", "publications/00000001.json", *(f"{version}/{name}" for name in wanted)])


@pytest.fixture(params=["local", "memory"])
def race(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Race:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Race(str(tmp_path) if request.param == "local" else f"memory://{secrets.token_hex(4)}", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_another_merge_may_pass_an_attempt_at_any_point(race: Race, task: str) -> None:
    for _ in race.disturb(task, race.merge):
        race.check()


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_an_attempt_may_die_at_any_point_whatever_of_its_writes_took_effect(race: Race, task: str) -> None:
    def die() -> None:
        raise ConnectionError("no answer")

    for _ in race.disturb(task, die):
        job = open_job(race.out, race.index, SMALL)
        if task == "build_shard" and job.shard_record(0):  # the manifest's task ends what the shard's did not
            stage.build_shard(job, 1)
            stage.publish(job)
        else:
            race.merge()
        race.check()


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_an_attempt_may_die_after_another_merge_has_passed_it(race: Race, task: str) -> None:
    def die() -> None:
        race.merge()
        raise ConnectionError("no answer")

    for _ in race.disturb(task, die):
        race.check()


def test_who_was_told_that_it_lost_though_it_won_sees_that_it_won(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Store.create

    def repeated(store: Store, name: str, data: bytes) -> bool:
        real(store, name, data)
        return real(store, name, data)

    race.job("train")
    monkeypatch.setattr(Store, "create", repeated)
    lines: list[str] = []
    merge(race.out, race.index, SMALL, progress=lines.append)
    race.check()
    assert not [line for line in lines if "another" in line]


def test_the_loser_says_so_and_a_task_that_is_done_too(race: Race) -> None:
    job, lines = race.job("build_shard"), list[str]()
    race.act, race.left = lambda: stage.build_shard(job, 0), 0
    stage.build_shard(job, 0, lines.append)
    stage.build_shard(job, 0, lines.append)
    stage.train(job, lines.append)
    assert lines[0].endswith("by another attempt")
    assert lines[1:] == ["index shard 1 of 2 is built already", f"version {job.version} is trained already"]
    assert stage.finished(job) is None
    manifest = race.merge()
    merge(race.out, race.index, replace(SMALL, seed=1))
    assert stage.finished(job) == manifest == stage.publish(job) == load_manifest(Store(race.index))


def test_merges_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race(str(tmp_path), monkeypatch)
    for _ in range(4):
        race.job("train")
        Store(race.index).remove_folder("")
        with ThreadPoolExecutor(4) as pool:
            manifests = list(pool.map(lambda _: race.merge(), range(4)))
        assert manifests == [load_manifest(Store(race.index))] * 4
        race.check()


KILL = """
import os, sys
from clip_batch.config import MergeConfig
from clip_batch.index.merge.merge import merge
from clip_batch.storage import store
from clip_batch.storage.store import Store

left = int(sys.argv[3])

def around(real):
    def disturbed(*arguments):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return real(*arguments)
    return disturbed

for name in ("create", "rename", "remove_folder"):
    setattr(Store, name, around(getattr(Store, name)))
store._sync = around(store._sync)
merge(sys.argv[1], sys.argv[2], MergeConfig(queries=20, shard_rows=30))
"""


@pytest.mark.slow
def test_kill_9_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race(str(tmp_path), monkeypatch)
    race.index = f"{tmp_path}/index"
    for number in (3, 6, 9, 12, 8):  # each goes on where the one before it ended
        done = subprocess.run([sys.executable, "-c", KILL, race.out, race.index, str(number)], capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    race.merge()
    race.check()


@pytest.mark.slow
def test_the_tasks_of_the_command_in_processes_of_their_own(tmp_path: Path) -> None:
    images, texts = clustered(4000, 16, 100)
    out, index = str(tmp_path / "out"), str(tmp_path / "index")
    make_out(out, images, texts, [1500, 2500])
    config = replace(CONFIG, shard_rows=1000, index_key="IVF16,Flat", queries=200)
    options = ["--shard-rows", "1000", "--index-key", "IVF16,Flat", "--queries", "200", "--json"]

    def run(*arguments: str) -> dict[str, object]:
        command = [sys.executable, "-m", "clip_batch", "merge", "--output", out, "--index", index, *options]
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout), said=done.stderr)

    version = open_job(out, index, config).version
    assert run("--task", "train").items() >= {"task": "train", "version": version, "index_shards": 4}.items()
    with ThreadPoolExecutor(3) as pool:  # slot 1 twice at once, and in the end the manifest too
        slots = [("--task", "shards", "--slots", "2", "--slot", slot) for slot in ("0", "1", "1")]
        list(pool.map(lambda flags: run(*flags), slots))
        assert not (tmp_path / "index/CURRENT").exists()
        assert len(Store(index).list(f"{version}/image")) == 4
        made = list(pool.map(lambda _: run("--task", "manifest"), range(2)))
    assert made[0]["created"] == made[1]["created"]
    for flags in (("--task", "train"), slots[0]):
        again = run(*flags)
        assert again["version"] == version and f"version {version} is finished already" in str(again["said"])
    assert verify_index(Store(index), deep=True).problems == {}
    with Searcher(index) as searcher:
        found = searcher.search(images[::40], k=1, effort=16)
        assert [line[0].metadata["key"] for line in found] == keys(images, [1500, 2500])[::40]
        assert searcher.manifest.recall == merge(out, str(tmp_path / "whole"), config).recall


def test_tasks_that_cannot_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, texts = clustered(20, 8, 3)
    plan = make_out(tmp_path / "out", images, texts, [10, 10], skip=[1])
    command = ["merge", "--output", str(tmp_path / "out"), "--index", str(tmp_path / "index")]
    for flags, code, text in (
        (("--task", "train"), 1, "run clip-batch worker"),
        (("--task", "shards"), 2, "needs --slot I and --slots N"),
        (("--task", "shards", "--slot", "0"), 2, "needs --slot I and --slots N"),
        (("--task", "train", "--slot", "0", "--slots", "2"), 2, "the other tasks take neither"),
        (("--slots", "2"), 2, "the other tasks take neither"),
        (("--task", "shards", "--slot", "2", "--slots", "2"), 2, "slots count from 0 to 1"),
        (("--task", "sing"), 2, "must be one of all, train, shards, manifest"),
    ):
        assert main([*command, *flags]) == code
        assert text in capsys.readouterr().err
    fabricated.commit(tmp_path / "out", plan, 1, images[10:], texts[10:])
    for flags, code, text in (
        (("--task", "shards", "--slot", "0", "--slots", "2"), 2, "not trained yet: run clip-batch merge --output"),
        (("--task", "manifest"), 2, "not trained yet: run clip-batch merge --output"),
        (("--task", "train"), 0, "image: key Flat"),
        (("--task", "shards", "--slot", "1", "--slots", "2"), 0, ""),  # more slots than shards
        (("--task", "manifest"), 1, "index shards 0 are not built"),
        ((), 0, "recall@10"),
    ):
        assert main([*command, *flags]) == code
        assert text in capsys.readouterr().err


def test_an_index_that_is_a_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "index").write_text("a file")
    for index in ("index", "index/below"):
        with pytest.raises(
            ConfigError, match=r"index cannot be written, as .*/index is no folder|below cannot be writ"
        ):
            merge(tmp_path / "nowhere", tmp_path / index)
