"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hdfs_cluster import hdfs as hdfs
from tests.slurm_cluster import slurm as slurm

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _no_options_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("CLIP_BATCH_"):
            monkeypatch.delenv(name)


@pytest.fixture
def out(tmp_path: Path) -> str:
    """The embeddings folder of a test."""
    return str(tmp_path / "out")
