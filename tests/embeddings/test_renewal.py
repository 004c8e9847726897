"""Partitions that are embedded again: their old commits count until the new ones replace them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from clip_batch.cli import main
from clip_batch.config import EmbedConfig, MergeConfig, PlanConfig
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.embed import embed
from clip_batch.embeddings.part_writer import PartWriter
from clip_batch.embeddings.renewal import renewals
from clip_batch.embeddings.status import status
from clip_batch.embeddings.verify import verify_output
from clip_batch.errors import ConfigError, CorruptError, InputError
from clip_batch.index.merge.merge import merge
from clip_batch.plan import paths
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.search.lineage import embedding
from clip_batch.search.searcher import Searcher
from clip_batch.storage.store import Store
from tests import corpus
from tests.embeddings.test_tar_edges import table

CPU = EmbedConfig(device="cpu", progress=False)
CONFIG = PlanConfig(model="fake:8", partition_samples=4)


@pytest.fixture
def tars(tmp_path: Path, out: str) -> Path:
    """Two tars, embedded, of which the second breaks off: its last sample is a failure."""
    (tmp_path / "in").mkdir()
    for number in range(2):
        corpus.good_tar(f"{tmp_path}/in/{number}.tar", 4, seed=number)
    shutil.copy(tmp_path / "in/1.tar", tmp_path / "whole.tar")
    with open(tmp_path / "in/1.tar", "r+b") as file:
        file.truncate(3 * 3 * 512 + 2048)
    make_plan(f"{tmp_path}/in", out, CONFIG)
    embed(out, CPU)
    assert sum(status(Store(out)).failures.values()) >= 1
    return tmp_path / "in"


def repair(out: str, *reasons: str) -> int:
    return main(["repair", "--output", out, "--device", "cpu", "--retry-failed", *reasons])


def test_a_tar_that_is_copied_again_is_embedded_as_it_is_now(tars: Path, out: str, tmp_path: Path) -> None:
    index, store = f"{tmp_path}/index", Store(out)
    merged = merge(out, index).rows
    shutil.copy(tmp_path / "whole.tar", tars / "1.tar")
    assert verify_output(store, deep=True).outdated == ["0001"]
    assert "1.tar has changed since; clip-batch repair" in verify_output(store, deep=True).problems["0001"]
    assert repair(out, "changed") == 0
    assert len(table(out, "metadata")) == 8 and status(store).failures == {}
    assert verify_output(store, deep=True).problems == {} and repair(out, "changed") == 0
    size = (tars / "1.tar").stat().st_size
    assert read_commits(store)[1].inputs[f"{tars}/1.tar"][0] == size and not read_commits(store)[0].inputs
    make_plan(str(tars), out, CONFIG)  # the plan agrees with what is embedded
    corpus.good_tar(f"{tars}/2.tar", 4, seed=2)
    make_plan(str(tars), out, PlanConfig(model="fake:8", partition_samples=4, extend=True))
    embed(out, CPU)
    with pytest.raises(ConfigError, match="with another content"):
        merge(out, index, MergeConfig(add=True))
    with Searcher(index) as searcher, pytest.raises(CorruptError, match="was embedded again since it was merged"):
        embedding(searcher.manifest, {"partition": 1, "row": 0}, 0)
    assert merged < 8 and merge(out, index, MergeConfig(anew=True)).rows == 12
    with Searcher(index) as searcher:
        assert embedding(searcher.manifest, {"partition": 1, "row": 0}, 0).shape == (8,)


def test_a_tar_that_changed_before_it_was_embedded(tmp_path: Path, out: str) -> None:
    for number in range(2):
        corpus.good_tar(f"{tmp_path}/{number}.tar", 4, seed=number)
    make_plan(f"{tmp_path}/*.tar", out, CONFIG)
    embed(out, CPU, [0])
    corpus.good_tar(f"{tmp_path}/1.tar", 5, seed=1)
    [outcome] = embed(out, CPU)
    assert "put that file back, or clip-batch repair --retry-failed changed embeds what is there" in outcome.error
    assert repair(out, "changed") == 0 and verify_output(Store(out), deep=True).problems == {}
    assert len(table(out, "metadata")) == 9


def test_a_tar_that_was_planned_in_slices_is_refused(tmp_path: Path, out: str) -> None:
    corpus.good_tar(f"{tmp_path}/0.tar", 12)
    make_plan(f"{tmp_path}/0.tar", out, CONFIG)
    embed(out, CPU)
    before = read_commits(Store(out))
    corpus.good_tar(f"{tmp_path}/0.tar", 13)
    with pytest.raises(InputError, match=r"0.tar changed, and was planned in slices"):
        renewals(Store(out), load_plan(Store(out)), ["changed"])
    assert read_commits(Store(out)) == before


def test_the_old_commit_counts_until_the_new_one_is_there(
    tars: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(out)
    before, names = read_commits(store), set(store.list("metadata"))
    renew = renewals(store, load_plan(store), [*before[1].failed])
    assert {*renew} == {1} and renewals(store, load_plan(store), ["not_parquet"]) == {}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "_publish", full)
        [outcome] = embed(out, CPU, [1], renew=renew)
    assert outcome.state == "failed" and read_commits(store) == before and set(store.list("metadata")) == names
    first = embed(out, CPU, [1], renew=renew)
    second = embed(out, CPU, [1], renew=renew)  # of a commit that is not there any more
    assert [first[0].state, second[0].state] == ["committed", "lost"]
    assert len(store.list(paths.RENEWED)) == 1 and len(store.list("metadata")) == len(names) + 1
    assert main(["gc", "--output", out]) == 0
    assert len(store.list("metadata")) == len(names) and verify_output(store, deep=True).problems == {}
