"""Families by name: those of other distributions, and a name that no family has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clip_batch import encoders
from clip_batch.cli import main
from clip_batch.errors import EncoderError
from tests import ROOT, corpus

ADAPTER = Path(__file__).with_name("adapter.py")
DOCUMENT = ROOT / "docs" / "models.md"


def test_the_adapter_in_the_document_is_the_one_tested() -> None:
    assert f"```python\n{ADAPTER.read_text()}```" in DOCUMENT.read_text()
    assert len(ADAPTER.read_text().splitlines()) < 50


@pytest.mark.slow
def test_another_distribution_registers_a_family(tmp_path: Path) -> None:
    shutil.copy(ADAPTER, tmp_path / "simpleshot.py")
    (tmp_path / "simpleshot-1.dist-info").mkdir()
    (tmp_path / "simpleshot-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: simpleshot\nVersion: 1\n"
    )
    entry = "[clip_batch.encoders]\nsimpleshot = simpleshot\n"
    (tmp_path / "simpleshot-1.dist-info" / "entry_points.txt").write_text(entry)
    np.save(tmp_path / "matrix.npy", np.random.default_rng(0).standard_normal((8, 768), dtype=np.float32))
    tar = corpus.good_tar(str(tmp_path / "a.tar"), 12)
    command = [sys.executable, "-m", "clip_batch", "embed", "--input", tar, "--output", str(tmp_path / "out")]
    flags = ["--model", "simpleshot:16", "--pretrained", "matrix.npy", "--device", "cpu", "--no-progress"]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    assert "12 samples embedded" in done.stdout
    assert main(["verify", "--output", str(tmp_path / "out"), "--deep"]) == 0


def test_a_family_that_does_not_turn_images_is_refused_where_they_are_to_be_turned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from clip_batch.encoders.families import fake

    turning, plain = (encoders.resolve("fake:8", exif_rotation=value) for value in (True, False))
    encoders.load(turning)
    monkeypatch.setattr(fake, "load", lambda spec, device, compiled: fake.FakeEncoder(8))
    encoders.load(plain)
    with pytest.raises(EncoderError, match="fake:8 does not apply EXIF orientation: plan with --exif-rotation ignore"):
        encoders.load(turning)


def test_the_demo_model_takes_no_other_weights() -> None:
    with pytest.raises(EncoderError, match="demo has its own weights: leave out --pretrained openai"):
        encoders.resolve("demo", "openai")


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(EncoderError, match="no family of models is called 'nonsense': there are fake, "):
        encoders.resolve("nonsense:x")
