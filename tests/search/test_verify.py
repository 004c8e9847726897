"""verify --index: that no search finds a removed row is proved by asking, and what was cached by looking again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import clip_batch
from clip_batch.cli import main
from clip_batch.config import MergeConfig
from clip_batch.index import removals
from clip_batch.index.ann.shards import OpenedIndex, Shards
from clip_batch.index.merge.merge import merge
from clip_batch.index.remove import remove_values
from clip_batch.search import verify
from clip_batch.search.searcher import Searcher
from clip_batch.search.verify import verify_searches
from clip_batch.storage.store import Store
from tests import corpus
from tests.fabricated import clustered, make_out
from tests.servers.flaky import Flaky

CONFIG = MergeConfig(queries=5, shard_rows=100)
KEYS = [f"0-{row}" for row in range(0, 200, 7)]


def build(folder: Path, config: MergeConfig = CONFIG) -> str:
    images, texts = clustered(300, 16, 20)
    texts[10:20] = 0  # no caption
    make_out(folder / "out", images, texts, [200, 100])
    merge(f"{folder}/out", f"{folder}/index", config)
    return f"{folder}/index"


@pytest.mark.parametrize(
    "config",
    [CONFIG, *(replace(CONFIG, index_key="IVF8,Flat", **more) for more in ({}, {"rerank": 5}, {"layout": "single"}))],
)
def test_removed_rows_are_searched_for(tmp_path: Path, config: MergeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    index = build(tmp_path, config)
    report = verify_searches(index, deep=True)
    assert (report.problems, report.removed, report.searched) == ({}, 0, 0)
    remove_values(index, KEYS)
    for deep in (False, True):
        report = clip_batch.verify(index, deep=deep)
        assert (report.problems, report.removed, report.searched) == ({}, len(KEYS), len(KEYS))
    assert main(["verify", "--index", index]) == 0
    assert f", {len(KEYS)} removed, none of {len(KEYS)} found by searches" in capsys.readouterr().out


def test_a_row_that_a_search_finds_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a kind of index did not honour what is removed."""
    index = build(tmp_path)
    remove_values(index, KEYS)
    of = Shards.of
    monkeypatch.setattr(Shards, "of", lambda parts: of([OpenedIndex(p.index, p.offset, p.rows) for p in parts]))
    report = verify_searches(index)
    assert not report.ok and f"{len(KEYS)} can be found, such as id" in report.problems["removed rows"]
    assert main(["verify", "--index", index]) == 1


def test_a_sample_is_searched_for_and_all_with_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(tmp_path)
    remove_values(index, KEYS)
    monkeypatch.setattr(verify, "SAMPLE", 7)
    monkeypatch.setattr(verify, "LARGE", 10)
    assert [verify_searches(index, deep).searched for deep in (False, True)] == [7, len(KEYS)]


def test_a_cache_that_lacks_rows_is_named_with_deep(tmp_path: Path) -> None:
    index = build(tmp_path)
    digest = remove_values(index, KEYS).digest
    remove_values(index, ["1-3"])
    (cached,) = Path(index).glob(f"*/tombstones/{digest}.npy")
    ids = np.load(cached)
    np.save(cached, ids[1:])
    with Searcher(index) as searcher:
        assert int(ids[0]) not in searcher.removed  # the harm that is done
    assert verify_searches(index).ok
    problems = verify_searches(index, deep=True).problems
    assert list(problems) == [f"removal list {digest}"]
    assert "of which 1 can be found: delete that folder" in problems[f"removal list {digest}"]
    cached.unlink()
    report = verify_searches(index, deep=True)
    assert (report.problems, report.removed) == ({}, len(KEYS) + 1)
    assert np.array_equal(np.load(cached), ids)


def test_a_remote_index_is_searched_with_deep_alone(tmp_path: Path) -> None:
    Flaky.reset()
    index, remote = build(tmp_path), Store("flaky://proof/index")
    for name in corpus.names_in(Store(index)):
        remote.replace(name, Path(index, name).read_bytes())
    remove_values(remote.url, KEYS)
    reports = [verify_searches(remote.url, deep) for deep in (False, True)]
    assert [(report.ok, report.removed, report.searched) for report in reports] == [
        (True, len(KEYS), 0),
        (True, len(KEYS), len(KEYS)),
    ]
    Flaky.reset()


def test_what_keeps_an_index_from_opening_is_a_problem(tmp_path: Path) -> None:
    index = build(tmp_path)
    removals.add(Store(index), "not_there", ["x"])
    assert "no metadata column 'not_there'" in verify_searches(index).problems["removed rows"]
