"""Predicted lists from merge to search: where they are learned, kept, used, and where they are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clip_batch.config import MergeConfig
from clip_batch.errors import CorruptError
from clip_batch.export.clip_retrieval import export_clip_retrieval
from clip_batch.index import removals
from clip_batch.index.ann import faiss_index
from clip_batch.index.ann.libfaiss import load
from clip_batch.index.manifest import Manifest, load_manifest
from clip_batch.index.merge import predict
from clip_batch.index.merge.merge import merge
from clip_batch.index.verify import verify_index
from clip_batch.search.query import Query
from clip_batch.search.searcher import Searcher
from clip_batch.storage.store import Store
from tests.fabricated import make_out, towers

ROWS, DIM = 6_000, 24
IMAGES, TEXTS = towers(ROWS + 2_000, DIM)
CONFIG = MergeConfig(queries=300, index_key="IVF64,Flat", modalities=("image",), shard_rows=3_000)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss_index.use_threads(1)


@pytest.fixture(autouse=True, scope="module")
def small_sets_count() -> Iterator[None]:
    """Prediction is used however little it saves: these sets are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "WORTH", 1)
        patch.setattr(predict, "LEAST_BYTES", 0)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OUT and its index, and another OUT for additions."""
    home = tmp_path_factory.mktemp("predict")
    make_out(home / "out", IMAGES[:ROWS], TEXTS[:ROWS], [2_000, 4_000])
    make_out(home / "more", IMAGES[ROWS:], TEXTS[ROWS:], [2_000])
    merge(str(home / "out"), str(home / "index"), CONFIG)
    return home


@pytest.fixture(scope="module")
def manifest(home: Path) -> Manifest:
    return load_manifest(Store(str(home / "index")))


def copied(home: Path, to: Path) -> str:
    """A copy of the index, to be changed."""
    shutil.copytree(home / "index", to / "index")
    return str(to / "index")


def rows_found(searcher: Searcher, images: np.ndarray, texts: np.ndarray, **how: object) -> float:
    """Recall@10 of captions among the images of a searcher, of which every row's number is its caption."""
    ids = searcher.search_ids(texts, 10, **how)[1]  # type: ignore[arg-type]
    table = searcher.table(ids.reshape(-1), ["partition", "row"])
    starts = np.cumsum([0, 2_000])
    rows = starts[np.asarray(table["partition"])] + np.asarray(table["row"])
    right = np.argsort(-(texts @ images.T), axis=1)[:, :10]
    return float(
        np.mean([np.isin(some, best).mean() for some, best in zip(rows.reshape(ids.shape), right, strict=True)])
    )


def test_captions_score_fewer_rows_for_the_same_recall(home: Path, manifest: Manifest) -> None:
    prediction = manifest.predicted["image"]["text"]
    assert prediction["used"]
    for k in ("10", "100"):
        assert prediction["rows"][k] < 0.9 * prediction["distance_rows"][k]
        assert manifest.recall["image"]["text"][k] >= CONFIG.recall_target  # type: ignore[literal-required]
    with Searcher(str(home / "index")) as searcher:
        found = rows_found(searcher, IMAGES[:ROWS], TEXTS[ROWS : ROWS + 500], kind="text")
        assert found >= CONFIG.recall_target - 0.03
        asked = [searcher.find(Query(embedding=text, kind="text")).hits for text in TEXTS[ROWS : ROWS + 20]]
        ids = searcher.search_ids(TEXTS[ROWS : ROWS + 20], 10, kind="text")[1]
        assert [[hit.id for hit in hits] for hits in asked] == ids.tolist()


def test_the_version_has_the_predictor_among_its_files(home: Path, manifest: Manifest) -> None:
    (name,) = manifest.predicted["image"]["text"]["file"]
    assert name.startswith(f"{manifest.version}/template/")
    assert manifest.files[name] == manifest.predicted["image"]["text"]["file"][name]
    assert verify_index(Store(str(home / "index")), deep=True).problems == {}


@pytest.mark.parametrize("damage", [b"", None], ids=["cut", "missing"])
def test_a_damaged_predictor_is_found_out(home: Path, manifest: Manifest, tmp_path: Path, damage: bytes | None) -> None:
    index, (name,) = copied(home, tmp_path), manifest.predicted["image"]["text"]["file"]
    path = Path(index, name)
    path.unlink() if damage is None else path.write_bytes(damage)
    assert "predictor of text queries in the image index" in verify_index(Store(index)).problems
    with pytest.raises(CorruptError, match=path.name):
        Searcher(index)


def test_efforts_for_readers_of_nearest_centroids_are_judged_without_prediction(
    home: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "FEWEST", ROWS + 1)
    plain = merge(str(home / "out"), str(tmp_path / "index"), CONFIG)
    assert plain.predicted == {"image": {}}
    assert (manifest.effort, manifest.efforts) == (plain.effort, plain.efforts)
    export_clip_retrieval(str(home / "index"), str(tmp_path / "export"))
    exported = load().read_index(str(tmp_path / "export" / "image.index"))
    assert load().try_extract_index_ivf(exported).nprobe == plain.effort["image"]
    with Searcher(str(home / "index")) as ours, Searcher(str(tmp_path / "index")) as theirs:
        for how in ({}, {"effort": 7}, {"k": 500, "kind": "text"}):  # nothing here is predicted
            np.testing.assert_array_equal(ours.search_ids(TEXTS[:9], **how)[1], theirs.search_ids(TEXTS[:9], **how)[1])  # type: ignore[arg-type]


def test_a_prediction_that_saves_too_little_is_recorded_and_not_used(
    home: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "WORTH", 10**9)
    unused = merge(str(home / "out"), str(tmp_path / "index"), CONFIG)
    for kind, prediction in unused.predicted["image"].items():
        assert prediction["rows"] == manifest.predicted["image"][kind]["rows"]
        assert (prediction["used"], prediction["file"]) == (False, {})
        assert unused.predicted_effort("image", 10, kind) is None
    with Searcher(str(tmp_path / "index")) as searcher:
        effort = unused.effort_for("image", 10, "text")
        predicted = searcher.search_ids(TEXTS[:50], 10, kind="text")
        np.testing.assert_array_equal(predicted[1], searcher.search_ids(TEXTS[:50], 10, effort=effort)[1])


def test_an_older_version_searches_as_before(home: Path, tmp_path: Path, manifest: Manifest) -> None:
    index = copied(home, tmp_path)
    path = Path(index, manifest.version, "manifest.json")
    fields = json.loads(path.read_text())
    del fields["predicted"]
    path.write_text(json.dumps(fields))
    with Searcher(index) as searcher:
        effort = manifest.effort_for("image", 10, "text")
        hits = searcher.search_ids(TEXTS[:50], 10, kind="text")[1]
        np.testing.assert_array_equal(hits, searcher.search_ids(TEXTS[:50], 10, effort=effort)[1])


def test_an_addition_keeps_the_predictor_of_the_template(home: Path, tmp_path: Path, manifest: Manifest) -> None:
    index = copied(home, tmp_path)
    added = merge(str(home / "more"), index, replace(CONFIG, add=True))
    assert added.base == manifest.version
    before, after = (each.predicted["image"]["text"] for each in (manifest, added))
    assert after["used"]
    assert after["file"] == before["file"]
    assert after["distance_rows"]["10"] > before["distance_rows"]["10"]  # of more rows in as many lists
    assert set(added.drift["image"]) == {"image", "text"}
    assert added.drift["image"]["text"] > 0.9
    assert verify_index(Store(index), deep=True).problems == {}
    with Searcher(index) as searcher:
        ids = searcher.search_ids(TEXTS[ROWS : ROWS + 200], 10, kind="text")[1]
    best = np.argsort(-(TEXTS[ROWS : ROWS + 200] @ IMAGES.T), axis=1)[:, 0]
    assert ((ids >= ROWS).any(axis=1) | (best < ROWS)).mean() > 0.9


@pytest.mark.slow
def test_one_file_and_ranked_again(home: Path, tmp_path: Path) -> None:
    index = str(tmp_path / "index")
    config = replace(CONFIG, index_key="IVF64,SQ8", layout="single", rerank=3)
    made = merge(str(home / "out"), index, config)
    assert made.predicted["image"]["text"]["used"]
    with Searcher(index) as searcher:
        assert rows_found(searcher, IMAGES[:ROWS], TEXTS[ROWS : ROWS + 500], kind="text") >= 0.92


def test_conditions_and_removals_hold(home: Path, tmp_path: Path) -> None:
    index = copied(home, tmp_path)
    with Searcher(index) as searcher:
        hits = searcher.search(TEXTS[:5], 10, kind="text")
        gone = [line[0].metadata["key"] for line in hits]
    removals.add(Store(index), "key", gone)
    with Searcher(index) as searcher:
        again = searcher.search(TEXTS[:5], 10, kind="text")
        assert all(len(line) == 10 for line in again)
        assert not {hit.metadata["key"] for line in again for hit in line} & set(gone)
        query = Query(embedding=TEXTS[7], kind="text", where="row < 400", k=20)
        found = searcher.find(query).hits
        assert len(found) == 20
        assert all(hit.metadata["row"] < 400 for hit in found)


def test_a_query_that_is_sure_of_lists_with_too_few_rows_looks_further(home: Path, manifest: Manifest) -> None:
    with Searcher(str(home / "index")) as searcher:
        few = searcher.manifest = replace(
            manifest,
            predicted={"image": {"text": {**manifest.predicted["image"]["text"], "efforts": {"10": 1, "100": 1}}}},
        )
        ids = searcher.search_ids(TEXTS[:1], 100, kind="text")[1]
        effort = few.effort_for("image", 100, "text")
        np.testing.assert_array_equal(ids, searcher.search_ids(TEXTS[:1], 100, effort=effort)[1])
        assert (ids >= 0).sum() > few.rows / 64  # more than a list has


@pytest.mark.slow
def test_few_rows_and_other_kinds_of_index_predict_nothing(tmp_path: Path) -> None:
    make_out(tmp_path / "out", IMAGES[:1_500], TEXTS[:1_500], [1_500])
    for key in ("Flat", "HNSW8", "IVF16,PQ12x4,RFlat"):
        made = merge(str(tmp_path / "out"), str(tmp_path / key), replace(CONFIG, index_key=key))
        assert made.predicted == {"image": {}}
    make_out(tmp_path / "few", IMAGES[:900], TEXTS[:900], [900])
    made = merge(str(tmp_path / "few"), str(tmp_path / "index"), CONFIG)
    assert made.predicted == {"image": {}}
