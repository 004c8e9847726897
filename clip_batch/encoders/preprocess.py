"""From image files to a model's pixels: by the model's own steps (`exact`), by torch (`fast`), or from less (`scaled`).

All of them stop before a transform's last two steps, ToTensor and Normalize, so that pixels stay uint8, a quarter of
the bytes of float32. `normalizer` does these two on the model's device. What each mode changes is in docs/formats.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode, Normalize
from torchvision.transforms.v2.functional import resize_image

from clip_batch.encoders.transforms import ResizeCrop, resize_and_crop, split, unsupported
from clip_batch.errors import EncoderError
from clip_batch.samples.decode import JPEGS, open_image, read_header
from clip_batch.samples.jpeg import plain_size
from clip_batch.samples.metadata import orientation

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL.Image import Image

    from clip_batch.encoders.encoder import Pixels
    from clip_batch.encoders.transforms import Steps

    Rows = npt.NDArray[np.uint8]
    """The pixels of an image as decoders give them, row by row (h, w, 3)."""

    Prepare = Callable[[bytes | memoryview, int], Pixels]
    """From an image file, and the most pixels that it may have, to pixels (3, h, w). DecodeError."""

MODES = ("exact", "fast", "scaled")

GAP = 2.0
"""`scaled` decodes a JPEG to at least this many times its size after the resize; another value is another encoder."""

STRIP = 2**22
"""Pixels that Pillow hands over at a time."""

_FLIPS = ((), (2,), (1, 2), (1,), (), (2,), (1, 2), (1,))
"""The axes to flip for each EXIF orientation, after a transposition of 5 to 8."""

GREY_SIDE = 8
GREY = b"P5 8 8 255\n" + bytes([128]) * GREY_SIDE**2
"""A small picture, whose pixels have the shape of all images of a model."""


class Preprocessing(NamedTuple):
    """How image files become what a model takes."""

    prepare: Prepare
    normalize: Normalize | None
    """What `normalizer` has to do with the uint8 pixels of `prepare`; None if they are float32 and complete."""


def from_transform(transform: Any, mode: str, upright: bool = False) -> Preprocessing:
    """A model's torchvision transform in one of `MODES`. EncoderError: only `exact` supports this transform.

    With `upright`, EXIF orientation is applied before it.
    """
    return from_steps(*split(transform), mode, upright)


def from_steps(
    steps: Steps, normalize: Normalize | None, mode: str, upright: bool = False, shape: ResizeCrop | None = None
) -> Preprocessing:
    """The same from the steps on Pillow images and the Normalize; `shape` replaces steps that are not torchvision's."""
    if mode == "exact":
        return Preprocessing(partial(exact, steps, upright=upright), normalize)
    if mode not in MODES:
        raise EncoderError(f"no preprocessing is called {mode!r}: there are {', '.join(MODES)}")
    shape = shape or resize_and_crop(steps, normalize)
    if mode == "fast":
        return Preprocessing(partial(fast, steps, shape, upright=upright), normalize)
    if shape.interpolation not in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC):
        raise unsupported(steps)
    return Preprocessing(partial(scaled, steps, shape, upright=upright), normalize)


def normalizer(normalize: Normalize, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """ToTensor and Normalize for batches on a device, bit for bit: from uint8 (n, 3, h, w) to float32."""
    # 255 is a tensor on the device: CUDA multiplies by the reciprocal of a plain number.
    white = torch.tensor(255.0, device=device)
    mean, std = (torch.as_tensor(values, device=device).view(-1, 1, 1) for values in (normalize.mean, normalize.std))

    def normalized(pixels: torch.Tensor) -> torch.Tensor:
        wide = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return wide.div_(white).sub_(mean).div_(std)

    return normalized


def exact(steps: Steps, data: bytes | memoryview, max_pixels: int, upright: bool = False) -> Pixels:
    """The result of the steps: uint8 (3, h, w), or float32 if they end in a tensor. DecodeError."""
    return _array(steps(open_image(data, max_pixels, upright)))


def fast(steps: Steps, shape: ResizeCrop, data: bytes | memoryview, max_pixels: int, upright: bool = False) -> Pixels:
    """uint8 (3, h, w), nearly those of `exact`: torch resizes RGB and grey images. DecodeError.

    The whole image is resized, then cropped: resizing only what the crop keeps gives other pixels. Images with a
    palette or transparency go through the steps, because Pillow resizes them differently.
    """
    return scaled(steps, shape, data, max_pixels, math.inf, upright)


def scaled(
    steps: Steps,
    shape: ResizeCrop,
    data: bytes | memoryview,
    max_pixels: int,
    gap: float = GAP,
    upright: bool = False,
) -> Pixels:
    """As `fast`, but a large JPEG is decoded to fewer pixels: at least `gap` times its size after the resize.

    A JPEG is turned when it is small, after the resize.
    """
    if jpeg := _jpeg_header(data, max_pixels, upright):
        height, width, turn = jpeg
        size = _size_before_turn(shape, height, width, turn)
        n = eighths(height, width, size, gap)
        pixels = _decode_jpeg(data, -(-height * n // 8), -(-width * n // 8)) if n < 8 else _decode_jpeg(data)
        if pixels is not None:
            # The scale is that of the whole image, because the sides of the decoded one are rounded up. 1e-7 is added
            # because interpolate rounds its result down.
            scale = [8 * new / (n * old) + 1e-7 for new, old in zip(size, (height, width), strict=True)]
            resized = _resize(pixels, size, shape.interpolation, scale if n < 8 else None)
            return shape.crop(_turned(resized, turn))
    image = open_image(data, max_pixels, upright)
    if image.mode not in ("RGB", "L"):
        return _array(steps(image))
    size = resized_size(shape.size, image.height, image.width)
    return shape.crop(_resize(_rgb(image), size, shape.interpolation))


def resized_size(size: Sequence[int], height: int, width: int) -> list[int]:
    """The height and width that torchvision's Resize gives an image.

    >>> resized_size([224], 600, 800), resized_size([224, 224], 600, 800)
    ([224, 298], [224, 224])
    """
    if len(size) == 2:
        return list(size)
    shorter = min(height, width)
    return [size[0] * height // shorter, size[0] * width // shorter]


def eighths(height: int, width: int, size: Sequence[int], gap: float) -> int:
    """The least of 1, 2 and 4 eighths of both sides that is at least `gap` times `size`; 8, the whole, if none is.

    libjpeg-turbo can also decode to the other eighths, but takes longer for five to seven than for the whole (no SIMD).
    """
    return next((n for n in (1, 2, 4) if height * n >= 8 * gap * size[0] and width * n >= 8 * gap * size[1]), 8)


def _jpeg_header(data: bytes | memoryview, max_pixels: int, upright: bool) -> tuple[int, int, int] | None:
    """Height, width and EXIF orientation of a JPEG that simplejpeg may decode in place of Pillow; None of all else.

    The orientation is 1 unless it is to be applied. DecodeError.
    """
    if size := plain_size(data, max_pixels, upright):
        return *size, 1
    if bytes(data[:2]) != b"\xff\xd8":
        return None
    image = read_header(data, max_pixels)
    if image.format not in JPEGS or image.mode not in ("RGB", "L"):
        return None
    return image.height, image.width, orientation(image) if upright else 1


def _resize(
    pixels: Rows, size: list[int], interpolation: InterpolationMode, scale: list[float] | None = None
) -> Pixels:
    """Pixels (h, w, 3) resized to `size`, (3, *size), as torchvision does it; with `scale`, by these factors."""
    if scale is None and pixels.shape[:2] == tuple(size):
        return pixels.transpose(2, 0, 1)
    # Of a batch with these strides torch knows that colours are last in memory, and does not reorder its result. numpy
    # makes it, because each of torch's calls gives up Python's lock and has to wait for it again.
    batch = torch.from_numpy(pixels.reshape(1, *pixels.shape).transpose(0, 3, 1, 2))
    if scale is None and interpolation is not InterpolationMode.BICUBIC:
        resized = resize_image(batch, size, interpolation, antialias=True)
    else:
        target, mode = (None if scale else size), interpolation.value
        resized = interpolate(batch, target, scale, mode, antialias=True, recompute_scale_factor=False)
    array: Pixels = resized.numpy()[0]
    return array


def _size_before_turn(shape: ResizeCrop, height: int, width: int, turn: int) -> list[int]:
    """The height and width to which an image is resized so that it has the right size once it is turned."""
    if turn < 5:
        return resized_size(shape.size, height, width)
    return resized_size(shape.size, width, height)[::-1]


def _turned(pixels: Pixels, turn: int) -> Pixels:
    """Pixels (3, h, w) of an EXIF orientation, made upright."""
    if turn >= 5:
        pixels = pixels.transpose(0, 2, 1)
    axes = _FLIPS[turn - 1]
    return np.flip(pixels, axes).copy("K") if axes else pixels


def _rgb(image: Image) -> Rows:
    """The pixels of an image of mode RGB or L, (h, w, 3); in strips, since Pillow copies twice what it hands over."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image if rows >= image.height else image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    return pixels


def _array(result: Any) -> Pixels:
    """The result of a transform's steps, an RGB image, a tensor or an array, as an array (3, h, w)."""
    if isinstance(result, np.ndarray):
        return result
    array: Pixels = result.numpy() if isinstance(result, torch.Tensor) else np.array(result).transpose(2, 0, 1)
    return array


def _decode_jpeg(data: bytes | memoryview, height: int = 0, width: int = 0) -> Rows | None:
    """The pixels of a JPEG, uint8 (h, w, 3), equal to Pillow's, in less time; None if simplejpeg rejects the file.

    With `height` and `width`, the smallest scale of the JPEG with at least this many pixels.
    """
    try:
        pixels: Rows = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:  # also for JPEGs that libjpeg only warns about; Pillow decides whether they are usable
        return None
    return pixels
