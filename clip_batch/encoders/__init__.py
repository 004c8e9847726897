"""Encoders: what turns images and captions into unit vectors, behind one narrow protocol.

`resolve` finds a model's identity (without loading it where its files are local); `load` loads it
and checks that it is the planned one. A new family is one module with those two functions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from clip_batch.cache import local_copy
from clip_batch.errors import EncoderError, InputError
from clip_batch.store import is_local, local_path
from clip_batch.types import EncoderSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]
    Pixels = npt.NDArray[np.uint8 | np.float32]


class Encoder(Protocol):
    """Images and texts to vectors of one space. `preprocess` is called from many threads at once."""

    dim: int

    def preprocess(self, data: bytes | memoryview, max_pixels: int) -> Pixels:
        """One image file to uint8 (3, height, width) of the model's size; DecodeError if it cannot be used.

        A model whose transform is not a usual one gets its result, float32, instead.
        """

    def encode_images(self, batch: Pixels) -> Array:
        """What `preprocess` gave, stacked to (n, 3, height, width), to float32 (n, dim), unit norm."""

    def encode_texts(self, texts: Sequence[str]) -> Array:
        """n texts to float32 (n, dim), unit norm."""


def _family(model: str) -> Any:
    if model.startswith("fake:"):
        from clip_batch.encoders import fake

        return fake
    from clip_batch.encoders import open_clip

    return open_clip


def resolve(
    model: str,
    pretrained: str = "",
    preprocess: str = "exact",
    precision: str = "fp32",
    options: dict[str, Any] | None = None,
) -> EncoderSpec:
    """The identity of an encoder; EncoderError if its weights cannot be found.

    `pretrained` may be a URL, opened with storage `options`.
    """
    if model.startswith("local-dir:"):
        model = "local-dir:" + os.path.abspath(model.removeprefix("local-dir:"))
    if os.path.isfile(pretrained):  # paths in a plan hold wherever it is read
        pretrained = os.path.abspath(pretrained)
    weights = _family(model).weights_digest(_located(model), _copied(pretrained, options))
    return EncoderSpec(model, pretrained, weights, preprocess, precision)


def load(spec: EncoderSpec, device: str = "auto", options: dict[str, Any] | None = None, compiled: int = 0) -> Encoder:
    """Load an encoder; EncoderError if its weights are not those of the spec.

    `device` is auto (cuda where there is one), cpu, cuda or cuda:N; storage `options` are for weights at a URL.
    `compiled` is the size of the batches that its image tower is compiled for (0: not), if there is one to compile.
    """
    located = replace(spec, model=_located(spec.model), pretrained=_copied(spec.pretrained, options))
    found = _family(spec.model).weights_digest(located.model, located.pretrained)
    if found != spec.weights:
        raise EncoderError(
            f"the weights of {spec.model} {spec.pretrained} are {found[:12]}, planned were {spec.weights[:12]}: "
            "put the planned weights back, or plan into another --output"
        )
    encoder: Encoder = _family(spec.model).load(located, device, compiled)
    return encoder


def encode_pairs(encoder: Encoder, batch: Pixels, captions: Sequence[str | None]) -> tuple[Array, Array]:
    """Image and text vectors, float32 (n, dim), of a batch as `encode_images` takes it and its n captions.

    A text row without a caption is zero. EncoderError: a vector has a NaN or inf.
    """
    import numpy as np

    images = encoder.encode_images(batch)
    texts = np.zeros_like(images)
    captioned = [index for index, caption in enumerate(captions) if caption is not None]
    if captioned:
        texts[captioned] = encoder.encode_texts([caption for caption in captions if caption is not None])
    for name, vectors in (("image", images), ("text", texts)):
        if not np.isfinite(vectors).all():
            raise EncoderError(f"the encoder gave a NaN or inf {name} vector: try --precision fp32")
    return images, texts


def _located(model: str) -> str:
    """`demo` stands for the embedded model, wherever this package lies."""
    if model != "demo":
        return model
    from clip_batch.demo.data import model_path

    return f"local-dir:{model_path()}"


def _copied(pretrained: str, options: dict[str, Any] | None) -> str:
    """A checkpoint at a URL copied to this machine's cache, once; anything else as it is."""
    if "://" not in pretrained or is_local(pretrained):
        return local_path(pretrained)
    try:
        return local_copy(pretrained, options)
    except (InputError, OSError) as error:
        raise EncoderError(f"the weights cannot be had: {error}") from None


def pick_device(device: str) -> str:
    """`auto` resolved: cuda where torch sees one, else cpu."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def threads() -> int:
    """Threads that one operation of this thread may take: torch's, 1 where it is not loaded."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else 1


def use_threads(count: int) -> None:
    """Let operations of this thread take so many; threads that torch meets later begin with the last count set."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)
