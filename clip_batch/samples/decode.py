"""Decoding images, with a rule for each kind of bad input; `texts` decodes what lies beside them."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image

from clip_batch.errors import DecodeError, one_line

# `read_header` counts pixels; Pillow's own limit would refuse images that `max_pixels` allows.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns of corrupt EXIF and the like, image by image; an image that decodes is used.
warnings.filterwarnings("ignore", module="PIL")

Image.init()
_RASTER = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF", "TGA")
FORMATS = tuple(name for name in _RASTER if name in Image.OPEN)
"""Formats that are decoded, whatever the name of the file; not EPS and the like, which run programs."""

JPEGS = ("JPEG", "MPO")
"""Pillow's names for a JPEG: phones write MPO, a JPEG with a preview or a depth map after it."""

MAX_ASPECT = 1000
"""Largest ratio of the sides: a transform that resizes the shorter side would make gigabytes of longer images."""


def open_image(data: bytes | memoryview, max_pixels: int) -> Image.Image:
    """Decode an image fully, as the model's transform expects it; DecodeError where that is not possible.

    Pixels are counted from the header, before decoding. Of an animation the first frame is decoded. EXIF rotation is
    not applied, as in open_clip. Greyscale of more than 8 bits is scaled to 8 bits: conversion to RGB would clip it
    to white.
    """
    return load_image(read_header(data, max_pixels))


def read_header(data: bytes | memoryview, max_pixels: int) -> Image.Image:
    """Read only the header of an image; DecodeError if that shows that the image cannot be used."""
    with _decode_errors():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise DecodeError("too_many_pixels", f"{width} x {height} pixels, more than {max_pixels}")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise DecodeError("extreme_aspect", f"{width} x {height}: sides differ more than {MAX_ASPECT}-fold")
        return image


def load_image(image: Image.Image) -> Image.Image:
    """Decode the rest of an image that `read_header` returned; DecodeError where that is not possible."""
    with _decode_errors():
        image.load()
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            del image.info["transparency"]  # it changes no colour, and Pillow warns when it converts it
        return _eight_bits(image)


@contextlib.contextmanager
def _decode_errors() -> Iterator[None]:
    """Turn any error into a DecodeError: Pillow raises nearly every type on hostile bytes."""
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:
        message = re.sub(r" ?<_io.BytesIO object at 0x[0-9a-f]+>", "", one_line(error))[:200]
        raise DecodeError("undecodable_image", f"{type(error).__name__}: {message}") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _scaled(image, 65535.0)
    return _scaled(image, 1.0) if image.mode == "F" else image


def _scaled(image: Image.Image, white: float) -> Image.Image:
    """8-bit greyscale, in which `white` becomes 255; values outside 0 to `white` are clipped."""
    values = np.asarray(image, dtype=np.float64) * (255.0 / white)
    return Image.fromarray(np.clip(np.nan_to_num(values), 0, 255).round().astype(np.uint8))
