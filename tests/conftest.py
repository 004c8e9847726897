"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.servers.hdfs_cluster import hdfs as hdfs
from tests.servers.slurm_cluster import slurm as slurm

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Machines are slow at times, and a new clone first makes hypothesis's tables: no test is about time.
settings.register_profile("unhurried", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


REQUIRED = os.environ.get("CLIP_BATCH_REQUIRE_SERVICES") == "1"
"""Whether a test that would be skipped, because a server or a library is missing, fails instead."""

NO_PYTHON = "no interpreter of Python"
NO_GPU = "no GPU that torch can use"
"""Words of the two reasons for a skip that nothing installed would mend."""

DEVICE = os.environ.get("CLIP_BATCH_TEST_DEVICE", "cuda")
"""The device of the tests marked `cuda`. On cpu, all of them run that can, so that a mistake in one is found there."""


def _must_run(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure, where `REQUIRED` says so."""
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        if any(reason in str(report.longrepr) for reason in (NO_PYTHON, NO_GPU)):
            return
        report.outcome = "failed"
        report.longrepr = f"CLIP_BATCH_REQUIRE_SERVICES=1 allows no skip: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _must_run(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _must_run(report)
    return report


@pytest.fixture(autouse=True)
def _no_options_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("CLIP_BATCH_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def device() -> str:
    """The device of a test marked `cuda`, which is skipped where torch can use no GPU."""
    if DEVICE.startswith("cuda"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip(NO_GPU)
    return DEVICE


@pytest.fixture
def cuda(device: str) -> str:
    """The same, of a test that means nothing on a CPU."""
    if not device.startswith("cuda"):
        pytest.skip(NO_GPU)
    return device


@pytest.fixture
def autofaiss() -> None:
    """Skips a test that asks autofaiss, where it is not installed."""
    pytest.importorskip("autofaiss", reason="the Makefile says how autofaiss is installed")


@pytest.fixture
def out(tmp_path: Path) -> str:
    """The embeddings folder of a test."""
    return str(tmp_path / "out")
