"""verify on an index: each kind of damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_batch.config import EmbedConfig, MergeConfig, PlanConfig
from clip_batch.embeddings.embed import embed
from clip_batch.errors import ClipBatchError
from clip_batch.index.manifest import load_manifest
from clip_batch.index.merge.merge import merge
from clip_batch.index.verify import verify_index
from clip_batch.plan.plan import make_plan
from clip_batch.search.searcher import Searcher
from clip_batch.storage.store import Store
from tests import corpus


@pytest.fixture
def index(tmp_path: Path, out: str) -> Path:
    tars = [corpus.good_tar(str(tmp_path / f"{number}.tar"), 30, seed=number) for number in range(2)]
    make_plan(tars, out, PlanConfig(model="fake:16"))
    embed(out, EmbedConfig())
    merge(out, str(tmp_path / "index"), MergeConfig(shard_rows=20))
    return tmp_path / "index"


def live(index: Path, name: str) -> Path:
    return index / load_manifest(Store(str(index))).version / name


def test_a_sound_index(index: Path) -> None:
    for deep in (False, True):
        report = verify_index(Store(str(index)), deep)
        assert (report.problems, report.checked, report.rows) == ({}, 3, 60)


def test_a_missing_file_and_a_short_one(index: Path) -> None:
    live(index, "image/0001.index").unlink()
    path = live(index, "metadata/0002.arrow")
    path.write_bytes(path.read_bytes()[:-8])
    problems = verify_index(Store(str(index))).problems
    assert set(problems) == {"index shard 0001", "index shard 0002"}
    assert "missing" in problems["index shard 0001"]
    assert "bytes" in problems["index shard 0002"]
    with pytest.raises(ClipBatchError, match="merge again"):
        Searcher(str(index))


def test_a_flipped_bit_is_seen_deep(index: Path) -> None:
    path = live(index, "text/0000.index")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert verify_index(Store(str(index))).ok
    problems = verify_index(Store(str(index)), deep=True).problems
    assert set(problems) == {"index shard 0000"}
    assert "sha256" in problems["index shard 0000"]
