"""Decode image files for samples: to tensors of one size, to Pillow images, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from clip_batch.encoders import preprocess, transforms
from clip_batch.errors import ConfigError
from clip_batch.samples.decode import open_image

Decode = Literal["tensor", "pil", "raw"]


def pictures(
    decode: Decode,
    size: int,
    max_pixels: int,
    transform: Callable[[Any], Any] | None = None,
    upright: bool = False,
) -> Callable[[bytes], Any]:
    """Return a function that decodes an image file; any number of threads may call it.

    tensor: uint8 (3, size, size), RGB; the shorter side is resized (bicubic), then the centre cropped, as CLIP's own
    transform does, by torch. pil: a Pillow image, RGB, of its original size. raw: the file's bytes. With `upright`,
    EXIF orientation is applied, except to raw bytes. If there is a `transform`, the function returns what it returns.
    The function raises DecodeError, and lets errors of `transform` pass. ConfigError: an argument is wrong.
    """
    if decode not in ("tensor", "pil", "raw"):
        raise ConfigError(f"decode is {decode!r}: there are tensor, pil and raw")
    if size < 1:
        raise ConfigError(f"size is {size}: it must be 1 or more")
    clip = transforms.build({"size": [size], "crop": [size, size], "mean": [0.0] * 3, "std": [1.0] * 3})
    prepare = preprocess.from_transform(clip, "fast", upright).prepare

    def decoded(data: bytes) -> Any:
        if decode == "tensor":
            return torch.from_numpy(prepare(data, max_pixels))
        return open_image(data, max_pixels, upright).convert("RGB") if decode == "pil" else data

    return decoded if transform is None else lambda data: transform(decoded(data))
