"""`fake:DIM`: an encoder without weights or torch, for tests and dry runs.

The vector of an image is a fixed random projection of its 8 x 8 thumbnail; that of a text is the sum of random vectors
of its words. Equal inputs have equal vectors, different ones do not, and encoding takes a few microseconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clip_batch.errors import EncoderError
from clip_batch.samples.decode import open_image
from clip_batch.types import EncoderSpec

if TYPE_CHECKING:
    from clip_batch.encoders.encoder import Array, Pixels

_SIDE = 8


def weights_digest(model: str, pretrained: str) -> str:
    """sha256 of the name, which is all that decides a vector."""
    if not model.removeprefix("fake:").isdigit():
        raise EncoderError(f"model {model!r} is not understood: write fake:DIM, such as fake:64")
    return hashlib.sha256(model.encode()).hexdigest()


def load(spec: EncoderSpec, device: str, compiled: int) -> FakeEncoder:
    """The encoder; `device` and `compiled` have no effect."""
    return FakeEncoder(int(spec.model.removeprefix("fake:")), spec.exif_rotation)


class FakeEncoder:
    """A `Model`; see the module."""

    has_text = True

    def __init__(self, dim: int, upright: bool = False) -> None:
        self.dim, self._upright = dim, upright
        self._projection = np.random.default_rng(0).standard_normal((3 * _SIDE * _SIDE, dim), dtype=np.float32)

    def preprocess(self, data: bytes | memoryview, max_pixels: int) -> Pixels:
        image = open_image(data, max_pixels, self._upright).convert("RGB").resize((_SIDE, _SIDE))
        return np.asarray(image).transpose(2, 0, 1)

    def encode_images(self, batch: Pixels) -> Array:
        pixels: npt.NDArray[Any] = batch.astype(np.float32) / 127.5 - 1 + 1e-3
        return _unit(pixels.reshape(len(batch), -1) @ self._projection)

    def encode_texts(self, texts: Sequence[str]) -> Array:
        rows = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split() or [""]:
                seed = int.from_bytes(hashlib.sha256(word.encode(errors="replace")).digest()[:8], "little")
                row += np.random.default_rng(seed).standard_normal(self.dim, dtype=np.float32)
        return _unit(rows)


def _unit(rows: Array) -> Array:
    unit: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
