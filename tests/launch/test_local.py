"""The local launcher: several processes over one plan."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clip_batch.cli import main
from clip_batch.embeddings.commits import committed
from clip_batch.launch import local
from clip_batch.storage.store import Store
from tests import corpus


@pytest.mark.slow
def test_embed_plans_first_and_several_workers_share(tmp_path: Path) -> None:
    for number in range(4):
        corpus.good_tar(str(tmp_path / f"{number:03d}.tar"), 30, seed=number)
    out = tmp_path / "out"
    arguments = ["embed", "--input", f"{tmp_path}/{{000..003}}.tar", "--model", "fake:8", "--partition-samples", "30"]
    command = [sys.executable, "-m", "clip_batch", *arguments, "--output", str(out), "--workers", "2"]
    for number in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("0 of 0 partitions done, 0 samples" if number else "4 of 4 partitions done, 120 samples") in done.stderr
    assert len(list((out / "img_emb").iterdir())) == 4
    assert main(["verify", "--output", str(out), "--deep"]) == 0
    again = ["fake:9" if word == "fake:8" else word for word in command[:-2]]
    refused = subprocess.run(again, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "fake:8" in refused.stderr
    assert "fake:9" in refused.stderr


@pytest.mark.slow
def test_sigterm_stops_all_workers_and_exits_75(tmp_path: Path, out: str) -> None:
    for number in range(4):
        corpus.good_tar(str(tmp_path / f"{number}.tar"), 1500, seed=number, side=96)
    inputs = ["--input", f"{tmp_path}/*.tar", "--model", "fake:8", "--partition-samples", "300"]
    assert main(["plan", *inputs, "--output", out]) == 0
    command = [sys.executable, "-m", "clip_batch", "embed", "--output", out, "--workers", "2", "--batch-size", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not committed(Store(out)) and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75, errors
    assert len(os.listdir(f"{out}/img_emb")) == len(committed(Store(out)))
    assert subprocess.run([*command[:-2], "--no-progress"], capture_output=True).stderr == b""
    assert main(["verify", "--output", out, "--deep"]) == 0


def test_a_slurm_job_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert local.job() == ""
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert local.job() == "slurm 9"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert local.job() == "slurm 7_3"
