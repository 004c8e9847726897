"""What this process may use: its cores, the device that `auto` stands for, torch's threads."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from clip_batch.encoders.device import cores, gpus, pick_device, torch_threads, use_torch_threads


@pytest.fixture(autouse=True)
def _outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)


def test_cores_are_those_of_the_affinity_and_of_the_slurm_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert cores() == 64
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert cores() == 8
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "128")  # more than the affinity allows
    assert cores() == 64


def test_cores_where_there_is_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1


def test_auto_is_a_gpu_where_torch_can_use_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == "cuda"
    assert [pick_device(name) for name in ("cpu", "cuda", "cuda:3")] == ["cpu", "cuda", "cuda:3"]


def test_auto_is_the_slurm_tasks_own_gpu_where_a_node_shows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (gpus(), pick_device("auto")) == (4, "cuda")
    monkeypatch.setenv("SLURM_LOCALID", "5")
    assert pick_device("auto") == "cuda:1"
    assert pick_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # --gpus-per-task=1 hides the others
    assert pick_device("auto") == "cuda"


def test_threads_that_decode_take_one_core_each_and_the_one_that_encodes_all() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with (
            ThreadPoolExecutor(2, "decode", use_torch_threads, (1,)) as decoders,
            ThreadPoolExecutor(1, "encode", use_torch_threads, (torch_threads(),)) as encoder,
        ):
            for _ in range(3):
                assert decoders.submit(torch.get_num_threads).result() == 1
                assert encoder.submit(torch.get_num_threads).result() == 3
        assert torch_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_without_torch_there_is_one_thread_and_nothing_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    use_torch_threads(2)
    assert torch_threads() == 1
