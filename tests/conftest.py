"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.servers.hdfs_cluster import hdfs as hdfs
from tests.servers.slurm_cluster import slurm as slurm

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Machines are slow at times, and a new clone first makes hypothesis's tables: no test is about time.
settings.register_profile("unhurried", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def _no_options_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("CLIP_BATCH_"):
            monkeypatch.delenv(name)


@pytest.fixture
def autofaiss() -> None:
    """Skips a test that asks autofaiss, where Python is too new for it."""
    if sys.version_info >= (3, 13):
        pytest.skip("autofaiss does not run on Python 3.13")


@pytest.fixture
def out(tmp_path: Path) -> str:
    """The embeddings folder of a test."""
    return str(tmp_path / "out")
