"""Greyscale of more than 8 bits to 8 bits, a strip at a time: Pillow's conversion to RGB would clip it to white.

What is white depends on where the numbers come from. Files of 16 (or 12) bits say it: 65,535 (4,095). TIFFs of floats,
of signed numbers, or of 32 bits do not, so the largest finite value of the picture decides: up to 255 the values are
8-bit levels, up to 65,535 16-bit levels, and beyond that the largest value is white. Floats up to 2 are fractions of 1,
with some overshoot. Values below 0 and NaN become black, infinity becomes white.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

STRIP = 2**20
"""Pixels that are converted at a time."""

_SIXTEEN = (np.arange(65536) * (255 / 65535)).round().astype(np.uint8)
"""The 8-bit level of each 16-bit level."""

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"""Tags of TIFF 6.0."""


def eight_bits(image: Image.Image) -> Image.Image:
    """A loaded image with 8 bits a channel: the image itself, or a greyscale copy of mode L."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    tags: Any = getattr(image, "tag_v2", {})
    bits, photometric, sample_format = (_first(tags.get(tag)) for tag in (_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT))
    unsigned = image.mode == "I" and image.format == "TIFF" and sample_format in (None, 1)
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        white = _white(image, unsigned)
    else:
        white = 4095.0 if bits == 12 else 65535.0
    grey = Image.new("L", image.size)
    for top, values in _strips(image, unsigned):
        levels = _SIXTEEN[values] if values.dtype == np.uint16 and white == 65535 else _levels(values, white)
        grey.paste(Image.fromarray(255 - levels if photometric == 0 else levels), (0, top))  # 0: white is zero
    grey.info, grey.format = image.info, image.format
    return grey


def _first(value: Any) -> Any:
    """The first of several values of a tag, or its only one."""
    return value[0] if isinstance(value, tuple) and value else value


def _strips(image: Image.Image, unsigned: bool) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """The first row and the values (rows, width) of each strip of an image."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        values = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        yield top, values.view(np.uint32) if unsigned else values


def _white(image: Image.Image, unsigned: bool) -> float:
    """The value that is white, by the largest finite one."""
    top = 0.0
    for _, values in _strips(image, unsigned):
        top = max(top, float(np.max(values, where=np.isfinite(values), initial=0)))
    if image.mode == "F" and top <= 2:
        return 1.0
    return next((white for white in (255.0, 65535.0) if top <= white), top)


def _levels(values: npt.NDArray[Any], white: float) -> npt.NDArray[np.uint8]:
    """The 8-bit levels of values, of which `white` becomes 255."""
    levels = values.astype(np.float64)
    levels *= 255 / white
    np.nan_to_num(levels, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
    np.clip(levels, 0, 255, out=levels)
    return np.rint(levels, out=levels).astype(np.uint8)
