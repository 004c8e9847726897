from __future__ import annotations

import io
import json
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from clip_batch.config import EmbedConfig, MergeConfig, PlanConfig, StorageConfig
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.embed import embed
from clip_batch.errors import ConfigError, CorruptError
from clip_batch.export.filter import filter_rows
from clip_batch.index.ann import faiss_index
from clip_batch.index.manifest import IndexShard, Manifest, MergedOutput
from clip_batch.index.merge.merge import merge
from clip_batch.plan import paths
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.search.lineage import Lineage, embedding, image, planned, shard_of, shows, where
from clip_batch.search.query import Query
from clip_batch.search.searcher import Searcher
from clip_batch.storage.store import Store
from tests import corpus
from tests.fabricated import ENCODER, clustered, make_out
from tests.servers.flaky import Flaky


def sources(manifest: Manifest, *outputs: str) -> Manifest:
    """Return the manifest as if it had been merged from these OUTs."""
    plans = [load_plan(Store(output)).digest for output in outputs]
    return replace(manifest, sources=tuple(MergedOutput(*pair, "", 0) for pair in zip(outputs, plans, strict=True)))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of four real tars, one compressed, in three partitions, which is merged in shards of 25 rows."""
    faiss_index.use_threads(1)
    root = tmp_path_factory.mktemp("lineage")
    for number in range(3):
        captions = [row % 3 > 0 for row in range(20)]
        corpus.good_tar(f"{root}/{number}.tar", 20, seed=number, captions=captions)
    corpus.write_tar(f"{root}/3.tar", corpus.good_files(5, 3), mode="w:gz")
    tars = [f"{root}/{number}.tar" for number in range(4)]
    make_plan(tars, f"{root}/out", PlanConfig(model="fake:8", partition_count=3))
    done = embed(f"{root}/out", EmbedConfig(batch_size=16, threads=2, progress=False))
    assert {outcome.state for outcome in done} == {"committed"}
    merge(f"{root}/out", f"{root}/index", MergeConfig(queries=5, shard_rows=25))
    return root


def members(root: Path) -> dict[str, bytes]:
    """Return the JPEGs of all tars by key, as the standard library reads them."""
    jpegs = {}
    for path in root.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    jpegs[member.name[:-4]] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return jpegs


def committed(root: Path) -> dict[tuple[int, str], np.ndarray]:
    """Return the matrices of all commits by partition and kind, as numpy reads them."""
    commits = read_commits(Store(f"{root}/out"))
    return {
        (number, kind): np.load(f"{root}/out/{commit.file(folder)}")
        for number, commit in commits.items()
        for kind, folder in (("image", "img_emb"), ("text", "text_emb"))
    }


@pytest.mark.slow
def test_every_row_leads_back_to_its_vectors_and_its_image(home: Path) -> None:
    images, matrices = members(home), committed(home)
    assert len({number for number, _ in matrices}) == 3
    with Searcher(f"{home}/index") as searcher:
        manifest = searcher.manifest
        assert manifest.rows == len(images) == 65 and len(manifest.shards) == 3
        rows = searcher.metadata(np.arange(manifest.rows))
        assert {row["key"] for row in rows} == set(images)
        for id, row in enumerate(rows):
            shard = shard_of(manifest, id)
            assert shard.offset <= id < shard.offset + shard.rows
            for kind in ("image", "text"):
                vector = embedding(manifest, row, shard.source, kind=kind)
                assert vector.dtype == np.float32
                np.testing.assert_array_equal(vector, matrices[row["partition"], kind][row["row"]])
                if vector.any():
                    # the fake encoder takes "caption 1 of tar 2" and "caption 2 of tar 1" for the same
                    best = searcher.search(vector, k=1 if kind == "image" else 2, modality=kind)[0]
                    assert id in [hit.id for hit in best]
                else:
                    assert (kind, row["caption"]) == ("text", None)
            packed = row["shard"].endswith("3.tar")  # compressed: no byte range
            assert image(row) == (None if packed else images[row["key"]])
            lineage = where(manifest, id, row)
            assert lineage == Lineage(
                f"{home}/out", row["partition"], row["row"], row["shard"], row["offset"], row["length"]
            )
            assert json.loads(json.dumps(asdict(lineage)))["row"] == row["row"]


@pytest.fixture
def remote(home: Path) -> StorageConfig:
    """Copy OUT and the first tar to a remote store, `flaky://home/...`."""
    Flaky.reset()
    fs = fsspec.filesystem("flaky")
    for path in [*(home / "out").rglob("*"), home / "0.tar"]:
        if path.is_file():
            fs.pipe_file(f"/home/{path.relative_to(home)}", path.read_bytes())
    Flaky.calls.clear()
    yield StorageConfig()
    Flaky.reset()


@pytest.mark.slow
def test_a_remote_row_costs_no_more_than_its_bytes(home: Path, remote: StorageConfig) -> None:
    with Searcher(f"{home}/index") as searcher:
        rows = searcher.metadata(np.arange(searcher.manifest.rows))
        origin = searcher.manifest.sources[0]
        manifest = replace(searcher.manifest, sources=(replace(origin, output="flaky://home/out"),))
    row = next(row for row in rows if row["shard"].endswith("0.tar"))
    vector = embedding(manifest, row, 0, remote)
    np.testing.assert_array_equal(vector, committed(home)[row["partition"], "image"][row["row"]])
    read = [stop - start for what, path, start, stop in Flaky.calls if what == "read" and path.endswith(".npy")]
    assert read == [256, 16]
    Flaky.calls.clear()
    remote_row = {**row, "shard": "flaky://home/0.tar"}
    assert image(remote_row, remote) == members(home)[row["key"]]
    assert [stop - start for what, _, start, stop in Flaky.calls if what == "read"] == [row["length"]]
    assert image({**remote_row, "shard": "flaky://home/gone.tar"}, remote) is None


def test_an_image_that_is_not_there_is_none(tmp_path: Path) -> None:
    corpus.good_tar(f"{tmp_path}/0.tar", 2)
    with tarfile.open(tmp_path / "0.tar") as tar:
        last = [member for member in tar if member.name.endswith(".jpg")][-1]
    row: dict[str, Any] = {"shard": f"{tmp_path}/0.tar", "offset": last.offset_data, "length": last.size}
    assert image(row) == corpus.jpeg(1)
    assert image({**row, "length": None}) is None
    assert image({**row, "offset": None}) is None
    assert image({"shard": f"{tmp_path}/0.tar"}) is None
    corpus.cut_file(f"{tmp_path}/0.tar", last.name)
    assert image(row) is None
    (tmp_path / "0.tar").unlink()
    assert image(row) is None


def test_the_shard_of_a_row() -> None:
    sizes = [3, 1, 5]
    offsets = np.cumsum([0, *sizes])
    shards = tuple(IndexShard(f"{i}", rows, int(offsets[i]), {}, source=i % 2) for i, rows in enumerate(sizes))
    manifest = Manifest("v", 0.0, 8, 9, ENCODER, "", {}, {}, {}, 0.95, (), False, shards)
    assert [shard_of(manifest, id).name for id in range(9)] == list("000122222")
    for id in (-1, 9):
        with pytest.raises(ConfigError, match=f"no row {id} in index version v: ids are 0 to 8"):
            shard_of(manifest, id)
    with pytest.raises(ConfigError, match="does not record its OUT: merge again"):
        where(manifest, 0, {"partition": 0, "row": 0, "shard": "a", "offset": None, "length": None})


def test_two_outs_are_told_apart(tmp_path: Path) -> None:
    """Two OUTs have different vectors at partition 1, row 2, and partition names of different widths."""
    images, texts = clustered(24, 8, 3)
    for name, part in (("a", slice(0, 12)), ("b", slice(12, 24))):
        make_out(tmp_path / name, images[part], texts[part], [4, 8])
    manifest = Manifest("v", 0.0, 8, 24, ENCODER, "", {}, {}, {}, 0.95, (), False, ())
    manifest = sources(manifest, str(tmp_path / "a"), str(tmp_path / "b"))
    for source in (0, 1):
        vector = embedding(manifest, {"partition": 1, "row": 2}, source)
        np.testing.assert_array_equal(vector, images[12 * source + 6].astype(np.float16))


def test_an_out_that_changed_is_refused_by_name(tmp_path: Path) -> None:
    images, texts = clustered(12, 8, 3)
    out = str(tmp_path / "out")
    make_out(out, images, texts, [4, 8])
    manifest = sources(Manifest("v", 0.0, 8, 12, ENCODER, "", {}, {}, {}, 0.95, (), False, ()), out)
    row, store = {"partition": 1, "row": 7}, Store(out)
    assert embedding(manifest, row, 0).any()
    path = read_commits(store)[1].file("img_emb") or ""
    whole = store.read(path)
    others = []
    for wrong in (np.zeros((7, 8), "<f2"), np.zeros((8, 9), "<f2"), np.zeros((8, 8), "<f8"), np.zeros(64, "<f2")):
        others.append(io.BytesIO())
        np.save(others[-1], wrong)
    for data in (whole[:-1], b"", *(other.getvalue() for other in others), None):
        store.remove(path) if data is None else store.replace(path, data)
        with pytest.raises(CorruptError, match=r"npy has no row 7 .*run clip-batch verify, then repair"):
            embedding(manifest, row, 0)
    store.replace(path, whole)
    with pytest.raises(CorruptError, match="has no row 8"):
        embedding(manifest, {"partition": 1, "row": 8}, 0)
    with pytest.raises(ConfigError, match="no vectors of 'sound': kinds are image, text"):
        embedding(manifest, row, 0, kind="sound")
    with pytest.raises(ConfigError, match="does not record its OUT"):
        embedding(manifest, row, 1)
    other = replace(manifest, sources=(replace(manifest.sources[0], plan="0" * 64),))
    with pytest.raises(CorruptError, match="was planned anew since it was merged"):
        embedding(other, row, 0)
    store.remove(f"{paths.COMMITS}/0001.json")
    with pytest.raises(CorruptError, match="partition 1 is no longer committed"):
        embedding(manifest, row, 0)


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
@pytest.mark.parametrize("name", ["img_emb_{}", "img_emb_000{}", "img_emb_0{}-0123abcd"])
def test_a_folder_without_commits(tmp_path: Path, dtype: str, name: str) -> None:
    (tmp_path / "img_emb").mkdir()
    images, _ = clustered(120, 8, 3)
    for number in range(12):
        np.save(tmp_path / "img_emb" / name.format(number), images[10 * number : 10 * number + 10].astype(dtype))
    source = MergedOutput(str(tmp_path), "", "", 120, verified=False)
    manifest = Manifest("v", 0.0, 8, 120, ENCODER, "", {}, {}, {}, 0.95, (), False, (), (source,))
    for number, row in ((0, 0), (1, 9), (11, 3)):
        vector = embedding(manifest, {"partition": number, "row": row}, 0)
        np.testing.assert_array_equal(vector, images[10 * number + row].astype(dtype))
    with pytest.raises(CorruptError, match="img_emb has 0 files of number 12"):
        embedding(manifest, {"partition": 12, "row": 0}, 0)
    with pytest.raises(CorruptError, match="has no row 10"):
        embedding(manifest, {"partition": 1, "row": 10}, 0)


def test_which_ids_our_planner_located(home: Path) -> None:
    with Searcher(str(home / "index")) as searcher:
        manifest = searcher.manifest
    assert planned(manifest) == [(0, manifest.rows)]
    assert planned(replace(manifest, sources=())) == []
    theirs = replace(manifest.sources[0], verified=False)
    mixed = [replace(shard, source=number % 2) for number, shard in enumerate(manifest.shards)]
    found = planned(replace(manifest, sources=(manifest.sources[0], theirs), shards=tuple(mixed)))
    assert found == [(shard.offset, shard.offset + shard.rows) for shard in mixed[::2]]


def test_pictures_of_folders_are_read_by_their_keys(tmp_path: Path) -> None:
    files = {
        "a.jpg": 1,
        "b.JPG": 2,
        "deep/c.png": 3,
        "d.jpg": 4,
        "d.png": 5,
        "e.jpg.jpg": 6,
        "f.Jpg": 7,
        "deep/g.jfif": 8,
    }
    files["deep/h.Picture"] = 9
    for name, seed in files.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(corpus.encode(corpus.picture(seed), "PNG") if name.endswith("png") else corpus.jpeg(seed))
    extensions = [*PlanConfig().image_extensions, "picture"]
    config = PlanConfig(model="fake:8", format="files", image_extensions=extensions)
    make_plan(tmp_path / "photos", tmp_path / "out", config)
    embed(f"{tmp_path}/out", EmbedConfig(device="cpu"))
    merge(f"{tmp_path}/out", f"{tmp_path}/index", MergeConfig(queries=2))
    with Searcher(f"{tmp_path}/index") as searcher:
        keys = {row["key"]: searcher.image(id) for id, row in enumerate(searcher.metadata(range(len(files))))}
        found = {(tmp_path / "photos" / name).read_bytes() for name in files}
        assert (
            set(keys) == {"a", "b", "deep/c", "d.jpg", "d.png", "e.jpg", "f", "deep/g", "deep/h"}
            and set(keys.values()) == found
        )
        assert keys["d.png"] == (tmp_path / "photos/d.png").read_bytes()
        filtered = filter_rows(searcher, Query(id=0, k=len(files)), Store(tmp_path / "found"), images=True)
        assert (filtered.images, filtered.missing) == (len(files), 0)
        row = searcher.metadata([0])[0]
        assert image(row | {"key": "../out/_clip_batch/plan.json"}) is None
        (tmp_path / "photos/a.jpg").unlink()
        assert image(row | {"key": "a"}) is None


def test_a_folder_of_texts_has_no_pictures_to_show(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in "abc":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"text {name}")
    (tmp_path / "texts" / "c.jpg").write_bytes(corpus.jpeg(1))
    make_plan(tmp_path / "texts", tmp_path / "out", PlanConfig(model="fake:8", format="files", modalities=["text"]))
    embed(f"{tmp_path}/out", EmbedConfig(device="cpu"))
    merge(f"{tmp_path}/out", f"{tmp_path}/index", MergeConfig(queries=2))
    with Searcher(f"{tmp_path}/index") as searcher:
        rows = enumerate(searcher.metadata(range(3)))
        shown = {row["key"]: shows(searcher.manifest, id, row, searcher.storage) for id, row in rows}
    assert shown == {"a": False, "b": False, "c": True}
