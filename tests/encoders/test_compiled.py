"""A compiled image tower on a CPU: eager's vectors, one shape, and one line where there is no runtime."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_batch import encoders
from clip_batch.cli import main
from clip_batch.config import EmbedConfig, PlanConfig
from clip_batch.demo import data
from clip_batch.embeddings.embed import embed
from clip_batch.errors import EncoderError
from clip_batch.plan import paths
from clip_batch.plan.plan import make_plan

pytestmark = pytest.mark.slow

SIZE = 8


@pytest.fixture(scope="module")
def eager() -> Any:
    return encoders.load(encoders.resolve("demo"), "cpu")


@pytest.fixture(scope="module")
def compiled() -> Any:
    return encoders.load(encoders.resolve("demo"), "cpu", compiled=SIZE)


@pytest.fixture(scope="module")
def pixels(eager: Any) -> np.ndarray:
    images = data.load()["image"].to_pylist()[:: 1911 // (2 * SIZE)]
    return np.stack([eager.preprocess(image, 10**6) for image in images])


@pytest.mark.parametrize("count", [SIZE, 1, SIZE - 1, 2 * SIZE])
def test_vectors_are_eagers_whatever_the_size_of_the_batch(
    eager: Any, compiled: Any, pixels: np.ndarray, count: int
) -> None:
    vectors = compiled.encode_images(pixels[:count])
    assert vectors.shape == (count, compiled.dim)
    np.testing.assert_allclose((vectors * eager.encode_images(pixels[:count])).sum(1), 1, atol=1e-5)


def test_halves_of_a_batch_too_large_for_memory_run_eagerly(
    eager: Any, compiled: Any, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def full(batch: object) -> object:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compiled, "_compiled", full)
    for count in (SIZE, SIZE - 1):
        found = compiled.encode_images(pixels[:count])
        np.testing.assert_allclose(found, eager.encode_images(pixels[:count]), atol=1e-5)


@pytest.fixture
def out(tmp_path: Path) -> str:
    """A plan of one partition of the demo's pictures."""
    tars = data.write_tars(str(tmp_path / "tars"), shards=160)[:1]
    make_plan(tars, str(tmp_path / "out"), PlanConfig(model="demo"))
    return str(tmp_path / "out")


def test_embed_compiles_for_its_batches(out: str, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(spec: object, device: str, options: object, size: int) -> Any:
        asked.append(size)
        return compiled

    monkeypatch.setattr(encoders, "load", load)
    assert [one.state for one in embed(out, EmbedConfig(device="cpu", batch_size=SIZE))] == ["committed"]
    os.remove(f"{out}/{paths.COMMITS}/0000.json")
    assert [one.state for one in embed(out, EmbedConfig(device="cpu", batch_size=SIZE, compile=True))] == ["committed"]
    assert asked == [0, SIZE]


def test_what_cannot_be_compiled_is_one_line_before_any_work(
    out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["embed", "--output", out, "--compile", "--device", "cpu", "--no-progress"]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(command) == 2
    assert "pip install 'clip-batch[onnx]'" in capsys.readouterr().err.splitlines()[-1]
    assert not os.path.exists(f"{out}/img_emb")
    with pytest.raises(EncoderError, match="is for precision fp32, not bf16"):
        encoders.load(encoders.resolve("demo", precision="bf16"), "cpu", compiled=SIZE)
