"""Encoders: what turns images and captions into unit vectors, behind one narrow protocol.

`resolve` finds a model's identity (without loading it where its files are local), and may download it;
`load` loads it, offline, and checks that it is the planned one. A family of models is one module with
`weights_digest` and `load`, registered in `FAMILIES` or by an entry point (see docs/models.md).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from clip_batch.encoders import hub
from clip_batch.encoders.embedded import model_path
from clip_batch.errors import EncoderError, InputError
from clip_batch.storage.cache import local_copy
from clip_batch.storage.paths import is_local, local_path
from clip_batch.types import EncoderSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]
    Pixels = npt.NDArray[np.uint8 | np.float32]


NO_TEXT = "this index's model has no text side: search by image, embedding or id"
"""Why a text cannot be encoded."""


class Encoder(Protocol):
    """Images and texts to vectors of one space. Its methods are called from several threads at once."""

    dim: int
    has_text: bool
    """Whether there is a text side; `encode_texts` raises EncoderError where there is none."""

    def preprocess(self, data: bytes | memoryview, max_pixels: int) -> Pixels:
        """One image file to uint8 (3, height, width) of the model's size; DecodeError if it cannot be used.

        A model whose transform is not a usual one gets its result, float32, instead.
        """

    def encode_images(self, batch: Pixels) -> Array:
        """What `preprocess` gave, stacked to (n, 3, height, width), to float32 (n, dim), unit norm."""

    def encode_texts(self, texts: Sequence[str]) -> Array:
        """n texts to float32 (n, dim), unit norm."""


class Family(Protocol):
    """What a family's module has. Both raise EncoderError, and take a local path where the model is one."""

    def weights_digest(self, model: str, pretrained: str) -> str:
        """sha256 over all that decides a vector: weights, configuration, tokenizer, preprocessing.

        Does not load a local model. May download, unless `hub.offline` holds.
        """

    def load(self, spec: EncoderSpec, device: str, compiled: int) -> Encoder:
        """The encoder; `device` and `compiled` are as `clip_batch.encoders.load` takes them."""


FAMILIES = {
    "fake": "clip_batch.encoders.families.fake",
    "hf-hub": "clip_batch.encoders.families.open_clip",
    "local-dir": "clip_batch.encoders.families.open_clip",
    "hf": "clip_batch.encoders.families.hf",
    "timm": "clip_batch.encoders.families.timm",
    "cn-clip": "clip_batch.encoders.families.cn_clip",
    "mclip": "clip_batch.encoders.families.mclip",
    "onnx": "clip_batch.encoders.families.onnx",
    "openvino": "clip_batch.encoders.families.onnx",
}
"""The module of each family, by what stands before the colon in a model's name; without a colon it is open_clip's."""

ENTRY_POINTS = "clip_batch.encoders"
"""The entry points by which other distributions register a family: its prefix = its module."""


def _family(model: str) -> Family:
    """The module of a model's family; EncoderError if there is none."""
    prefix, colon, _ = model.partition(":")
    module = FAMILIES.get(prefix) if colon else "clip_batch.encoders.families.open_clip"
    if module is None:
        module = next((found.value for found in entry_points(group=ENTRY_POINTS) if found.name == prefix), None)
    if module is None:
        raise EncoderError(f"no family of models is called {prefix!r}: there are {', '.join(FAMILIES)}")
    family: Family = import_module(module)
    return family


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
    prefix, _, name = model.partition(":")
    for folder in (name, name.partition("+")[0]):  # paths in a plan hold wherever it is read
        if os.path.isdir(folder):
            model = f"{prefix}:{os.path.abspath(folder)}{name.removeprefix(folder)}"
            break
    if os.path.isfile(pretrained):
        pretrained = os.path.abspath(pretrained)
    located = _located(model)
    weights = _family(located).weights_digest(located, _copied(pretrained, options))
    return EncoderSpec(model, pretrained, weights, preprocess, precision)


def load(spec: EncoderSpec, device: str = "auto", options: dict[str, Any] | None = None, compiled: int = 0) -> Encoder:
    """Load an encoder; EncoderError if its weights are not those of the spec.

    `device` is auto (cuda where there is one), cpu, cuda or cuda:N; storage `options` are for weights at a URL.
    `compiled` is the size of the batches that its image tower is compiled for (0: not), if there is one to compile.
    """
    located = replace(spec, model=_located(spec.model), pretrained=_copied(spec.pretrained, options))
    with hub.offline():
        check(_family(located.model).weights_digest(located.model, located.pretrained), spec)
        return _family(located.model).load(located, device, compiled)


def check(found: str, planned: EncoderSpec) -> None:
    """EncoderError where a digest is not the planned one."""
    if found != planned.weights:
        raise EncoderError(
            f"the weights of {planned.model} {planned.pretrained} are {found[:12]}, planned were "
            f"{planned.weights[:12]}: put the planned weights back, or plan into another --output"
        )


def encode_pairs(encoder: Encoder, batch: Pixels, captions: Sequence[str | None]) -> tuple[Array, Array | None]:
    """Image and text vectors, float32 (n, dim), of a batch as `encode_images` takes it and its n captions.

    A text row without a caption is zero; a model without a text side has no text vectors at all, None.
    EncoderError: a vector has a NaN or inf.
    """
    import numpy as np

    images = encoder.encode_images(batch)
    texts = np.zeros_like(images) if encoder.has_text else None
    captioned = [index for index, caption in enumerate(captions) if caption is not None]
    if captioned and texts is not None:
        texts[captioned] = encoder.encode_texts([caption for caption in captions if caption is not None])
    for name, vectors in (("image", images), ("text", texts)):
        if vectors is not None and not np.isfinite(vectors).all():
            raise EncoderError(f"the encoder gave a NaN or inf {name} vector: try --precision fp32")
    return images, texts


def _located(model: str) -> str:
    """`demo` stands for the embedded model, wherever this package lies."""
    if model != "demo":
        return model

    return f"local-dir:{model_path()}"


def _copied(pretrained: str, options: dict[str, Any] | None) -> str:
    """A checkpoint at a URL copied to this machine's cache, once; anything else as it is."""
    if "://" not in pretrained or is_local(pretrained):
        return local_path(pretrained)
    try:
        return local_copy(pretrained, options)
    except (InputError, OSError) as error:
        raise EncoderError(f"the weights cannot be had: {error}") from None
