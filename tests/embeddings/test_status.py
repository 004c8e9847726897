"""status: the same figures from workers' records as from commits, and signs of life."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clip_batch.cli import main
from clip_batch.config import EmbedConfig, PlanConfig
from clip_batch.embeddings import submission, workers
from clip_batch.embeddings.commits import read_commit
from clip_batch.embeddings.embed import embed
from clip_batch.embeddings.status import OutputStatus, describe, status
from clip_batch.embeddings.workers import WorkerRecord
from clip_batch.plan import paths
from clip_batch.plan.plan import make_plan
from clip_batch.plan.state import SILENT
from clip_batch.storage.store import Store
from tests import corpus

CONFIG = EmbedConfig(batch_size=4, threads=2)


@pytest.fixture
def store(tmp_path: Path, out: str) -> Store:
    """Four partitions of ten samples, one of them bad; the first three are committed."""
    for number in range(4):
        broken = [number == 1 and sample == 3 for sample in range(10)]
        corpus.good_tar(str(tmp_path / f"{number}.tar"), 10, seed=number, broken=broken)
    make_plan([f"{tmp_path}/*.tar"], out, PlanConfig(model="fake:8", partition_count=4))
    embed(out, CONFIG, [0, 1, 2])
    return Store(out)


def record(store: Store) -> tuple[str, WorkerRecord]:
    (name,) = store.list(paths.WORKERS)
    return f"{paths.WORKERS}/{name}", workers.read_records(store)[0]


def without_times(state: OutputStatus) -> dict[str, Any]:
    return {name: value for name, value in vars(state).items() if name not in ("gpu_hours", "workers")}


def test_records_and_commits_tell_the_same(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    state = status(store)
    assert (state.done, state.missing, state.rows) == (3, [3], 29)
    assert state.failures == {"undecodable_image": 1}
    assert state.images_per_second > 0
    name, kept = record(store)
    assert kept.ended and sorted(kept.committed) == ["0", "1", "2"]
    with monkeypatch.context() as patch:  # records alone suffice
        patch.setattr("clip_batch.embeddings.commits.Commit", None)
        assert status(store) == state
    store.remove(name)
    assert without_times(status(store)) == without_times(state)


def test_what_is_not_committed_any_more_does_not_count(store: Store) -> None:
    store.remove(f"{paths.COMMITS}/0001.json")
    state = status(store)
    assert (state.done, state.missing, state.rows) == (2, [1, 3], 20)


def test_a_silent_worker_is_not_running(store: Store) -> None:
    name, kept = record(store)
    now = time.time()
    for ended, beat, running in ((False, now, [3]), (False, now - SILENT - 1, []), (True, now, [])):
        changed = replace(kept, ended=ended, beat=beat, started=beat - 3600, gpus=2, running=[2, 3], job="slurm 7_1")
        store.replace(name, json.dumps(vars(changed)).encode())
        state = status(store)
        assert state.running == running  # partition 2 is committed
        assert [worker.job for worker in state.workers] == (["slurm 7_1"] if running else [])
        assert state.gpu_hours == pytest.approx(2)
    assert "2.0 GPU-hours" in describe(state)


def test_a_record_that_cannot_be_written_does_not_stop_the_worker(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Store, name: str, data: bytes) -> None:
        raise OSError("no")

    monkeypatch.setattr(Store, "replace", refuse)
    assert [outcome.state for outcome in embed(store.url, CONFIG)] == ["committed"]
    assert status(store).relaunch is None


def test_repair_forgets_what_records_told(store: Store) -> None:
    commit = read_commit(store, "0001")
    Path(store.path(commit.file("img_emb") or "")).unlink()
    assert main(["repair", "--output", store.url, "--batch-size", "4"]) == 0
    assert len(store.list(paths.WORKERS)) == 1
    assert status(store).rows == 39


def test_the_relaunch_command_is_the_last_submissions(store: Store) -> None:
    assert status(store).relaunch == f"clip-batch worker --output {store.url} --partitions 3"
    for number in range(2):
        made = submission.draft([3], "slurm", 1, 1, f"clip-batch submit slurm {number}")
        submission.publish(store, replace(made, id=f"2026010{number + 1}-000000-00000{number}"))
    assert status(store).relaunch == "clip-batch submit slurm 1"


def test_a_commit_whose_answer_was_lost_keeps_its_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    create = Store.create

    def deny(self: Store, name: str, data: bytes) -> bool:
        create(self, name, data)
        return False

    def break_off(self: Store, name: str, data: bytes) -> bool:
        create(self, name, data)
        raise OSError("connection reset")

    for liar, states in ((deny, ["committed"]), (break_off, ["failed"])):
        store.remove(f"{paths.COMMITS}/0003.json")
        with monkeypatch.context() as patch:
            patch.setattr(Store, "create", liar)
            assert [outcome.state for outcome in embed(store.url, CONFIG)] == states
        assert main(["verify", "--output", store.url, "--deep"]) == 0
