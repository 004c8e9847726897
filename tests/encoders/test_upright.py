"""EXIF orientation applied by choice: every way to decode, and every family, gives the pixels of the turned picture."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from clip_batch import encoders
from clip_batch.types import EncoderSpec
from tests import corpus, tiny

pytestmark = pytest.mark.slow

LIMIT = 10**8


def rotated(orientation: int, width: int, height: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return corpus.encode(corpus.picture(orientation, 64).resize((width, height)), kind, exif=exif.tobytes())


def turned(data: bytes) -> bytes:
    """The same picture with its pixels turned, and no EXIF."""
    return corpus.encode(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"), "PNG")


@pytest.mark.parametrize(("mode", "most"), [("exact", 0), ("fast", 2), ("scaled", 4)])
@pytest.mark.parametrize("size", [(97, 61), (61, 97), (301, 203), (640, 481)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_all_ways_to_decode_turn_alike(mode: str, most: int, size: tuple[int, int], resize_mode: str) -> None:
    from open_clip.transform import image_transform

    from clip_batch.encoders import preprocess

    prepare = partial(preprocess.from_transform, image_transform(32, is_train=False, resize_mode=resize_mode))
    for orientation in range(1, 9):
        for kind in ("JPEG", "PNG"):
            data = rotated(orientation, *size, kind)
            expected = prepare("exact").prepare(turned(data), LIMIT).astype(int)
            found = prepare(mode, True).prepare(data, LIMIT).astype(int)
            assert np.abs(found - expected).max() <= most, (orientation, kind)
            plain = prepare(mode).prepare(data, LIMIT).astype(int)
            assert (np.abs(plain - expected).max() > 20) == (orientation > 1)


def models(tmp_path: Path) -> list[tuple[str, str]]:
    from clip_batch.encoders.onnx_export import export_onnx

    pytest.importorskip("onnxscript")
    export_onnx("demo", "", str(tmp_path / "export"))
    (tmp_path / "hf").mkdir()
    hf, onnx = f"hf:{tiny.clip(tmp_path / 'hf')}", f"onnx:{tmp_path / 'export'}"
    return [("demo", "exact"), ("demo", "fast"), (hf, "exact"), (hf, "scaled"), (onnx, "exact"), ("fake:8", "exact")]


def test_all_families_turn_alike(tmp_path: Path) -> None:
    for model, mode in models(tmp_path):
        upright, plain = (
            encoders.load(encoders.resolve(model, preprocess=mode, exif_rotation=value), "cpu")
            for value in (True, False)
        )

        def pixels(encoder: Any, data: bytes) -> np.ndarray:
            found: np.ndarray = encoder.preprocess(data, LIMIT).astype(int)
            return found

        data = rotated(6, 301, 203)
        expected = pixels(plain, turned(data))
        assert np.abs(pixels(upright, data) - expected).max() <= (0 if mode == "exact" else 4), model
        assert np.abs(pixels(plain, data) - expected).max() > 20, model


def test_the_choice_is_part_of_the_fingerprint_and_old_ones_stay() -> None:
    assert EncoderSpec("m", "p", "w", "fast").fingerprint == "11d2bab0f0d0eefa"
    assert EncoderSpec("m", "p", "w", "fast", exif_rotation=True).fingerprint != "11d2bab0f0d0eefa"
