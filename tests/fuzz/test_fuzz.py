"""10,000 mutated tars, and as many pictures: no traceback, no hang, no flood of memory, and the sum always holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.fuzz import mutate

pytestmark = pytest.mark.slow


def test_every_sample_of_hostile_tars_is_a_row_or_a_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.fuzz.run", "10000"]  # a process, to measure its memory
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10,000 mutated tars: ")


def test_hostile_pictures_are_decoded_or_refused() -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.fuzz.pictures", "10000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10,000 mutated pictures: ")


def test_the_same_seed_gives_the_same_tars() -> None:
    assert list(mutate.tars(3, 30)) == list(mutate.tars(3, 30)) != list(mutate.tars(4, 30))
