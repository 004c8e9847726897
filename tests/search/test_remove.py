"""Opt-out by example and by condition: what is found once stays removed, for every reader, in every version."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import clip_batch
from clip_batch.cli import main
from clip_batch.config import MergeConfig
from clip_batch.errors import ConfigError
from clip_batch.export.clip_retrieval import export_clip_retrieval
from clip_batch.index import removals
from clip_batch.index.merge.merge import merge
from clip_batch.index.removal_history import list_removals, undo
from clip_batch.index.versions import use
from clip_batch.search.query import Query
from clip_batch.search.remove import remove_found
from clip_batch.search.searcher import Searcher
from clip_batch.storage.store import Store
from tests.fabricated import clustered, commit, make_out, make_plan

CONFIG = MergeConfig(queries=5, shard_rows=100)
COPIES = {"0-3", "0-150", "1-20"}
"""The keys of rows with the picture that opts out."""


def vectors(rows: int = 300) -> tuple[Any, Any]:
    images, texts = clustered(rows, 16, 20)
    images[[150, 220]] = images[3]
    return images, texts


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("merged")
    images, texts = vectors()
    make_out(home / "out", images, texts, [200, 100])
    merge(f"{home}/out", f"{home}/index", CONFIG)
    return home / "index"


@pytest.fixture
def index(merged: Path, tmp_path: Path) -> str:
    """A copy of INDEX."""
    shutil.copytree(merged, tmp_path / "index")
    return f"{tmp_path}/index"


def example(**more: Any) -> Query:
    return Query(**{"embedding": vectors()[0][3], "threshold": 0.999, **more})


def keys(index: str) -> set[str]:
    return set(clip_batch.read(index).to_table(columns=["key"])["key"].to_pylist())


def nearest(index: str) -> str:
    with Searcher(index) as searcher:
        return str(searcher.search(vectors()[0][3], 1)[0][0].metadata["key"])


@pytest.mark.parametrize(
    "config",
    [CONFIG, *(replace(CONFIG, index_key="IVF8,Flat", **more) for more in ({}, {"rerank": 5}, {"layout": "single"}))],
)
def test_rows_like_an_example_stay_removed_in_every_version(tmp_path: Path, config: MergeConfig) -> None:
    images, texts = vectors()
    make_out(tmp_path / "out", images, texts, [200, 100])
    index = f"{tmp_path}/index"
    first = merge(f"{tmp_path}/out", index, config).version
    everything = keys(index)
    report = remove_found(index, example(), note="opted out")
    assert (report.rows, report.version, report.column, report.exact) == (3, first, "", True)
    assert {row.key for row in report.sample} == COPIES
    assert all(row.score is not None and row.score > 0.999 for row in report.sample)
    assert keys(index) == everything - COPIES and nearest(index) not in COPIES
    # Merged anew, in another order of rows and of shards.
    second = merge(f"{tmp_path}/out", index, replace(config, seed=7, shard_rows=70)).version
    assert second != first and keys(index) == everything - COPIES
    # Added to: a new row that resembles the example stays, as documented; a removal of today names rows of today.
    plan = make_plan(tmp_path / "new", 3)
    for number in (0, 1):
        commit(tmp_path / "new", plan, number, images[:0], texts[:0])
    commit(tmp_path / "new", plan, 2, images[:50], texts[:50])
    merge(f"{tmp_path}/new", index, replace(config, add=True))
    assert keys(index) == (everything - COPIES) | {f"2-{row}" for row in range(50)}
    assert remove_found(index, example()).rows == 1
    assert not (COPIES | {"2-3"}) & keys(index)
    for version in (first, second):
        use(Store(index), version)
        assert keys(index) == everything - COPIES
    undo(index, report.digest)
    assert keys(index) == everything


@pytest.mark.slow
def test_no_reader_has_the_rows_until_they_are_put_back(index: str, tmp_path: Path) -> None:
    query = example(threshold=-1.0)
    report = remove_found(index, example())

    def seen(name: str) -> list[set[str]]:
        with Searcher(index) as searcher:
            found = [{hit.metadata["key"] for hit in searcher.search(vectors()[0][3], 300)[0]}]
            found.append({hit.metadata["key"] for hit in searcher.find(example(threshold=None, k=300)).hits})
            found.append({row["key"] for row in searcher.metadata(searcher.select(np.arange(300)).ids)})
        clip_batch.filter(index, query, tmp_path / f"{name}-rows")
        found.append(set(pq.read_table(tmp_path / f"{name}-rows/rows")["key"].to_pylist()))
        found.append(keys(index))
        clip_batch.FilteredDataset(index, query, selection=tmp_path / f"{name}-selection")
        selected = pa.ipc.open_file(str(tmp_path / f"{name}-selection/rows.arrow")).read_all()
        found.append(set(selected["key"].to_pylist()))
        export_clip_retrieval(index, f"{tmp_path}/{name}-export")
        table = pq.read_table(f"{tmp_path}/{name}-export/metadata")
        found.append(set(table["key"].to_pylist()) - {None, ""})
        return found

    for one in seen("removed"):
        assert len(one) == 297 and not one & COPIES
    undo(index, report.digest)
    for one in seen("undone"):
        assert len(one) == 300 and one >= COPIES


def test_a_condition_names_the_rows_of_today(index: str) -> None:
    report = remove_found(index, where='n < 3 and shard contains "00001"')
    assert report.rows == 3 and {row.key for row in report.sample} == {"1-0", "1-1", "1-2"}
    assert all(row.score is None for row in report.sample)
    assert not {"1-0", "1-1", "1-2"} & keys(index)
    again = remove_found(index, where='n < 3 and shard contains "00001"')
    assert (again.rows, again.digest, again.sample) == (0, "", ())
    assert remove_found(index, example(where="n > 100")).rows == 1  # 0-150
    assert {info.digest for info in list_removals(index)} == set(removals.names(Store(index)))
    where, by_example = (info.about for info in list_removals(index))
    assert where["where"] == 'n < 3 and shard contains "00001"' and where["rows"] == 3
    assert by_example["query"]["threshold"] == 0.999 and by_example["query"]["where"] == "n > 100"


def test_a_dry_run_writes_nothing(index: str) -> None:
    before = sorted(map(str, Path(index).rglob("*")))
    report = remove_found(index, example(threshold=0.5), dry_run=True)
    assert report.dry_run and report.rows > 10 == len(report.sample)
    scores = [row.score for row in report.sample]
    assert (
        scores == sorted(scores, key=lambda score: -(score or 0)) and {row.key for row in report.sample[:3]} == COPIES
    )
    assert sorted(map(str, Path(index).rglob("*"))) == before
    assert remove_found(index, example(threshold=1.5)).rows == 0
    assert sorted(map(str, Path(index).rglob("*"))) == before


def test_every_list_is_visited_whatever_was_tuned(tmp_path: Path) -> None:
    images, texts = clustered(2000, 16, 40, spread=2.0)
    make_out(tmp_path / "out", images, texts, [2000])
    config = MergeConfig(queries=5, index_key="IVF64,Flat", recall_target=0.3)
    assert merge(f"{tmp_path}/out", f"{tmp_path}/index", config).effort["image"] < 20  # type: ignore[operator]
    exact = int(np.count_nonzero(images @ images[3] >= 0.3))
    query = Query(embedding=images[3], threshold=0.3)
    assert exact > 50 and remove_found(f"{tmp_path}/index", query, dry_run=True).rows == exact


def test_scores_of_compressed_vectors_are_said_to_be_so(tmp_path: Path) -> None:
    images, texts = vectors()
    make_out(tmp_path / "out", images, texts, [200, 100])
    merge(f"{tmp_path}/out", f"{tmp_path}/index", replace(CONFIG, index_key="IVF4,SQ8"))
    assert not remove_found(f"{tmp_path}/index", example(threshold=0.95), dry_run=True).exact


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "by a query or by a condition"),
        ({"query": example(), "where": "n = 1"}, "by a query or by a condition"),
        ({"query": "a dog"}, "must be of clip_batch.Query"),
        ({"where": "n = 1", "note": 5}, "note is 5: it must be a text"),
        ({"query": Query(text="a", k=3)}, "with a threshold, and without k"),
        ({"query": example(k=3)}, "with a threshold, and without k"),
        ({"query": example(unique=True)}, "with a threshold, and without k"),
        ({"query": Query(embedding=[1.0], threshold=0.9)}, "it has 1 numbers"),
        ({"where": " "}, "the condition is empty"),
        ({"where": []}, "the condition is empty"),
        ({"where": "url = 3"}, "no metadata column url"),
        ({"where": "n ="}, "where, at its end"),
    ],
)
def test_what_names_no_rows_is_refused(index: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        remove_found(index, **arguments)
    assert removals.histories(Store(index)) == {}


def test_the_command_and_the_functions(index: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "face.npy", vectors()[0][3])

    def remove(*words: str) -> tuple[int, str, str]:
        code = main(["remove", "--index", index, *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    face = ("--embedding", f"{tmp_path}/face.npy", "--threshold", "0.999")
    assert remove("--list") == (0, "nothing was removed\n", "")
    code, out, _ = remove(*face, "--dry-run")
    assert code == 0 and "1.000  0-150  caption 0-150\n" in out
    assert "3 rows of the live version would be removed; rows that are added later stay" in out
    code, out, err = remove(*face, "--note", "by mail")
    assert code == 0 and "3 rows of the live version removed" in out and "as tombstones/" in err
    assert remove("--value", "0-1", "--value", "zz")[1].startswith(
        "1 row of the live version removed by 2 values of key"
    )
    assert remove("--value", "5", "--column", "n", "--where", "n = 5")[0] == 2
    code, out, _ = remove("--where", 'key = "0-9"')
    assert code == 0 and "1 row of the live version removed" in out
    digest = clip_batch.removals(index)[0].digest
    assert f"{digest}  20" in remove("--list")[1] and "by mail" in remove("--list")[1]
    assert remove("--undo", digest)[1] == "3 rows of the live version can be found again\n"
    code, _, err = remove("--undo", digest)
    assert code == 2 and err.count("\n") == 1 and "is undone already" in err
    for words, message in (
        ((), "does one thing"),
        (("--list", "--undo", digest), "does one thing"),
        (("--image", "a.jpg"), "--threshold is needed"),
        (("--keys", "a", "--threshold", "0.9"), "--threshold has no effect"),
        (("--where", "n = 1", "--threshold", "0.9"), "--threshold has no effect"),
        (("--undo", digest, "--dry-run"), "--undo has no --dry-run"),
        (("--embedding", "nowhere.npy", "--threshold", "0.9"), "nowhere.npy is no file"),
        (("--embedding", __file__, "--threshold", "0.9"), "is no .npy file of numbers: give one that numpy.save"),
        (("--image", f"{tmp_path}", "--embedding", "x", "--threshold", "0.9"), "x is no file"),
    ):
        code, _, err = remove(*words)
        assert code == 2 and err.count("\n") == 1 and message in err, (words, err)
    assert clip_batch.remove(index, query=example(), note="again").digest == digest
    assert clip_batch.undo_removal(index, digest, note="once more").rows == 3
    assert [len(info.history) for info in clip_batch.removals(index)] == [4, 1, 1]
    assert clip_batch.remove(index, where="n = 3", dry_run=True).rows == 2
    with pytest.raises(ConfigError, match="one of keys, query and where"):
        clip_batch.remove(index)
    with pytest.raises(ConfigError, match="one of keys, query and where"):
        clip_batch.remove(index, ["a"], where="n = 3")
