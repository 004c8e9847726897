"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import sys
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

TOO_NEW = "does not run on Python"
"""Words of the one reason for a skip that nothing installed would mend."""


def _must_run(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure, where `REQUIRED` says so."""
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail") and TOO_NEW not in str(report.longrepr):
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


@pytest.fixture
def autofaiss() -> None:
    """Skips a test that asks autofaiss, where Python is too new for it."""
    if sys.version_info >= (3, 13):
        pytest.skip(f"autofaiss {TOO_NEW} 3.13")


@pytest.fixture
def out(tmp_path: Path) -> str:
    """The embeddings folder of a test."""
    return str(tmp_path / "out")
