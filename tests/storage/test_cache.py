"""Local copies of remote files: weights at a URL are copied once for each version of the file."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from clip_batch import encoders
from clip_batch.errors import EncoderError

URL = "memory://weights/model.pt"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "clip_batch" / "files"


def put(data: bytes) -> None:
    fsspec.filesystem("memory").pipe_file("/weights/model.pt", data)


def test_weights_at_a_url_are_copied_once_a_version(home: Path, tmp_path: Path) -> None:
    put(b"one" * 1000)
    (tmp_path / "model.pt").write_bytes(b"one" * 1000)
    local = encoders.resolve("ViT-B-32", str(tmp_path / "model.pt"))
    for _ in range(2):
        there = encoders.resolve("ViT-B-32", URL)
        assert (there.pretrained, there.fingerprint) == (URL, local.fingerprint)
        assert len(list(home.glob("*.pt"))) == 1
    put(b"two" * 1001)
    with pytest.raises(EncoderError, match="planned were"):
        encoders.load(there)
    assert len(list(home.glob("*.pt"))) == 2
    assert not list(home.glob("*.part")) and not list(home.glob("*.pieces"))


def test_weights_that_are_not_there_are_named() -> None:
    with pytest.raises(EncoderError, match=r"weights cannot be found.*memory://weights/none\.pt"):
        encoders.resolve("ViT-B-32", "memory://weights/none.pt")
