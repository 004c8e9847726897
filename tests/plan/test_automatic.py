"""Partitions that no option says: some 64 for many workers, a few hundred samples at least in each, at most 4 GB."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_batch.cli import main
from clip_batch.config import PlanConfig
from clip_batch.errors import PlanError
from clip_batch.plan.automatic import affordable, automatic_target
from clip_batch.plan.pack import pack
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.storage.store import Store
from clip_batch.types import Shard
from tests import corpus
from tests.plan.test_plan import commit_one


@pytest.mark.parametrize(
    ("shards", "sample_bytes", "target"),
    [
        ([Shard("a", 10**9)] * 6, 30_000, ("partitions", 64)),
        ([Shard("a", 10**9)] * 6, 3_000_000, ("partitions", 7)),  # photographs, 2,000 of them
        ([Shard("a", 10**9)] * 40, 30_000, ("partitions", 40)),  # whole tars
        ([Shard("a", 10**9)] * 1000, 30_000, ("bytes", 4 * 10**9)),
        ([Shard("a", 10**9)] * 100, 30_000, ("partitions", 64)),
        ([Shard("a", 10**6)] * 4, 30_000, ("bytes", 4 * 10**9)),  # few samples: one partition
        ([Shard("a", 10**9)] * 6, 0, ("bytes", 4 * 10**9)),  # nothing could be read
        ([Shard("a", 10**9, samples=256)] * 3, 1, ("partitions", 3)),  # counts go before estimates
        ([], 0, ("bytes", 4 * 10**9)),
    ],
)
def test_targets_of_tars(shards: list[Shard], sample_bytes: float, target: tuple[str, int]) -> None:
    assert automatic_target(shards, "tar", sample_bytes) == target


@pytest.mark.parametrize(
    ("samples", "partitions"), [(0, 1), (1, 1), (500, 1), (512, 2), (16_384, 64), (640_000, 64), (1_000_000, 100)]
)
def test_targets_of_folders(samples: int, partitions: int) -> None:
    target = automatic_target([Shard("a", samples=samples)], "files", 0)
    assert target.unit == "samples" and -(-max(samples, 1) // target.value) == partitions


def test_remote_tars_are_not_read_to_be_cut() -> None:
    shards = [Shard("s3://b/a.tar", 10**9), Shard("/a.tar", 10**9), Shard("s3://b/c.tar", 5 * 10**9)]
    places = {number: [10.0] for number in range(3)}
    assert affordable(places, shards, "tar") == {1: [10.0], 2: [10.0]}
    assert affordable(places, shards, "parquet") == places
    remote = [Shard(f"s3://b/{number}.tar", 10**9) for number in range(6)]
    assert len(pack(remote, automatic_target(remote, "tar", 30_000))) == 6


@pytest.fixture
def tars(tmp_path: Path) -> list[str]:
    """Two tars of 600 small samples."""
    picture = corpus.jpeg(0)
    return [
        corpus.write_tar(f"{tmp_path}/{tar}.tar", [(f"{number:04d}.jpg", picture) for number in range(600)])
        for tar in "ab"
    ]


def test_tars_are_cut_and_a_second_plan_is_the_same(tars: list[str], tmp_path: Path) -> None:
    lines: list[str] = []
    config = PlanConfig(model="fake:8")
    plan = make_plan(tars, f"{tmp_path}/out", config, progress=lines.append)
    assert lines[-1] == "4 partitions planned"
    counts = [sum(piece.samples or 0 for piece in partition.slices) for partition in plan.partitions[::2]]
    assert all(abs(count - 300) < 10 for count in counts)
    assert make_plan(tars, f"{tmp_path}/out", config, progress=lines.append) == plan and lines[-1] == "unchanged"
    commit_one(f"{tmp_path}/out")
    with pytest.raises(PlanError, match=r"partition target auto -> 2 partitions\)"):
        make_plan(tars, f"{tmp_path}/out", PlanConfig(model="fake:8", partition_count=2))


def test_a_plan_of_the_former_default_is_kept(tars: list[str], tmp_path: Path) -> None:
    make_plan(tars, f"{tmp_path}/out", PlanConfig(model="fake:8", partition_bytes="4GB"))
    commit_one(f"{tmp_path}/out")
    assert len(make_plan(tars, f"{tmp_path}/out", PlanConfig(model="fake:8")).partitions) == 1
    assert len(load_plan(Store(f"{tmp_path}/out")).partitions) == 1


def test_fewer_partitions_than_workers_are_told(
    tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("clip_batch.plan.plan.loaded_gpus", lambda: 8)
    monkeypatch.setattr("clip_batch.launch.doctor.gpus", lambda: 8)
    out = f"{tmp_path}/out"
    words = ["--input", *tars, "--output", out, "--model", "fake:8", "--partition-count", "2"]
    assert main(["plan", *words]) == 0
    assert "fewer partitions than the 8 GPUs of this machine: --partition-count 8" in capsys.readouterr().err
    main(["doctor", "--output", out])
    assert "partitions: 2 partitions are fewer than the 8 GPUs here" in capsys.readouterr().out


def test_submit_tells_that_workers_would_be_idle(tars: list[str], tmp_path: Path) -> None:
    from clip_batch.config import EmbedConfig, MergeConfig, StorageConfig, SubmitConfig
    from clip_batch.launch.submit import SubmitRequest, tell_idle

    make_plan(tars, f"{tmp_path}/out", PlanConfig(model="fake:8", partition_count=2))
    lines: list[str] = []
    for tasks in (0, 2, 3):
        submit = SubmitConfig(tasks=tasks)
        request = SubmitRequest(f"{tmp_path}/out", "", StorageConfig(), submit, EmbedConfig(), MergeConfig())
        tell_idle(request, 1, lines.append)
    (line,) = lines
    assert "only 2 partitions are missing, fewer than the 3 workers that are asked for: 1 would be idle" in line
