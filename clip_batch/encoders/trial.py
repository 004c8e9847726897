"""The first forward pass of a model: `plan` makes one, so that what every worker would refuse is refused there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clip_batch.config import EmbedConfig
from clip_batch.encoders.encoder import Model, NeedsExact
from clip_batch.encoders.registry import load
from clip_batch.errors import ClipBatchError, DecodeError, EncoderError, one_line
from clip_batch.types import EncoderSpec

if TYPE_CHECKING:
    from clip_batch.encoders.encoder import Array, Pixels

_MOST_PIXELS = EmbedConfig.max_pixels
"""Larger pictures are not tried."""

_TOLERANCE = 1e-3
"""How far two vectors of one input may be apart in each number."""

_GREY = b"P5 32 32 255\n" + bytes([128]) * 32**2
"""The picture that is tried where none of the input can be decoded."""

_PICTURES = (b"P6 32 32 255\n" + bytes([230, 40, 20]) * 32**2, b"P5 32 32 255\n" + bytes(range(0, 256, 8)) * 32)
"""A red one, and a grey one that grows brighter to the right."""

_CAPTIONS = ("a red apple on a wooden table", "two dogs run through the snow at night")

_EQUAL = 1e-6
"""Vectors that are this near in each number are equal but for rounding."""


def try_model(
    spec: EncoderSpec,
    images: Iterable[bytes | memoryview],
    caption: str = "a picture",
    options: dict[str, Any] | None = None,
    modes: Sequence[str] = (),
) -> EncoderSpec:
    """Embed the first of some image files that can be decoded, and a caption; return the spec that this worked with.

    The first of the preprocessing `modes` (default: the spec's) that supports the model's transform is taken. All runs
    on the CPU, and in fp32 instead of fp16 and bf16, so that a machine that only plans needs no GPU. Storage `options`
    are for weights at a URL.

    EncoderError: the model cannot be loaded, cannot embed, or gives no vectors that can be compared.
    ModuleNotFoundError: a library is missing.
    """
    *others, last = modes or (spec.preprocess,)
    for mode in others:
        try:
            return _try(replace(spec, preprocess=mode), images, caption, options)
        except NeedsExact:
            pass
    return _try(replace(spec, preprocess=last), images, caption, options)


def _try(
    spec: EncoderSpec, images: Iterable[bytes | memoryview], caption: str, options: dict[str, Any] | None
) -> EncoderSpec:
    tried = replace(spec, precision="fp32") if spec.precision in ("fp16", "bf16") else spec
    name = f"{spec.model} {spec.pretrained}".strip()
    try:
        encoder = load(tried, "cpu", options, check=False)
        _check_vectors(name, encoder, _pixels(encoder, images), caption)
        _check_contrast(name, encoder)
    except (ClipBatchError, ImportError, MemoryError):
        raise
    except Exception as error:  # models raise errors of any class
        raise EncoderError(
            f"{name} cannot embed a picture ({type(error).__name__}: {one_line(error, 300)}): take a model that "
            "docs/models.md lists, or plan with --no-try-model if only this machine cannot run it"
        ) from None
    return spec


def _pixels(encoder: Model, images: Iterable[bytes | memoryview]) -> Pixels:
    """The pixels of the first image that can be decoded; of a grey one where none can."""
    for image in images:
        try:
            return encoder.preprocess(image, _MOST_PIXELS)
        except DecodeError:
            continue
    return encoder.preprocess(_GREY, _MOST_PIXELS)


def _check_vectors(model: str, encoder: Model, pixels: Pixels, caption: str) -> None:
    """EncoderError if the vectors of a picture and a caption have no norm, or differ in length or from pass to pass."""
    import numpy as np

    batch = np.stack([pixels, pixels])
    passes = {"picture": [encoder.encode_images(batch), encoder.encode_images(batch)]}
    if encoder.has_text:
        passes["caption"] = [encoder.encode_texts([caption, caption]), encoder.encode_texts([caption, caption])]
    for kind, (first, second) in passes.items():
        if first.shape != (2, encoder.dim):
            raise EncoderError(
                f"{model} gives a {kind} {first[0].size} numbers, and its dimension is {encoder.dim}: pictures and "
                "captions are not in one space; take another model, see docs/models.md"
            )
        rows: Array = np.concatenate([first, second])
        if not np.allclose(np.linalg.norm(rows, axis=1), 1, atol=5 * _TOLERANCE):
            raise EncoderError(f"{model} gives a {kind} a vector of zeros or NaN: check its weights")
        if not np.allclose(rows, rows[0], atol=_TOLERANCE):
            raise EncoderError(
                f"{model} gives the same {kind} another vector each time (cosine {rows.dot(rows[0]).min():.3f}), as "
                "models do that mask at random (ViT-MAE): take another model, see docs/models.md"
            )


def _check_contrast(model: str, encoder: Model) -> None:
    """EncoderError if two quite different pictures, or two quite different texts, have one vector."""
    import numpy as np

    pictures = np.stack([encoder.preprocess(picture, _MOST_PIXELS) for picture in _PICTURES])
    first, second = encoder.encode_images(pictures)
    if np.abs(first - second).max() < _EQUAL:
        raise EncoderError(f"{model} gives quite different pictures the same vector: check its weights and processor")
    if not encoder.has_text:
        return
    first, second = encoder.encode_texts(_CAPTIONS)
    if np.abs(first - second).max() < _EQUAL:
        raise EncoderError(f"{model} gives quite different texts the same vector: check its tokenizer and weights")
