"""Bytes to what an encoder takes: images, captions, JSON. Each bad input has its rule here."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from clip_batch.errors import DecodeError, one_line

# Our own check of the header counts pixels; Pillow's would refuse what `max_pixels` allows.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns of corrupt EXIF and the like, image by image; what decodes is embedded.
warnings.filterwarnings("ignore", module="PIL")

Image.init()
_RASTER = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF", "TGA")
FORMATS = tuple(name for name in _RASTER if name in Image.OPEN)
"""What is decoded, whatever the member's name says; not EPS and its like, which run programs."""

JPEGS = ("JPEG", "MPO")
"""Pillow's names of a JPEG: MPO is what phones write, with a preview or a depth map behind the picture."""

MAX_DEPTH = 100
"""Nesting of a JSON side-car; deeper ones would meet Python's recursion limit when written again."""

MAX_ASPECT = 1000
"""Longer to shorter side: a transform that resizes the shorter one would make gigabytes of more."""


def open_image(data: bytes | memoryview, max_pixels: int) -> Image.Image:
    """Decode an image fully, as the model's own transform takes it; DecodeError if that cannot be.

    Pixels are counted from the header, before decoding. The first frame of an animation is taken.
    EXIF rotation is not applied, as open_clip does not. Greyscale of more than 8 bits is scaled to
    8: a plain conversion to RGB would clip it to white.
    """
    return load_image(read_header(data, max_pixels))


def read_header(data: bytes | memoryview, max_pixels: int) -> Image.Image:
    """An image of which nothing but the header has been read; DecodeError if that is enough to refuse it."""
    with _refused():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise DecodeError("too_many_pixels", f"{width} x {height} pixels, more than {max_pixels}")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise DecodeError("extreme_aspect", f"{width} x {height}: sides differ more than {MAX_ASPECT}-fold")
        return image


def load_image(image: Image.Image) -> Image.Image:
    """What `open_image` gives, of what `read_header` gave; DecodeError."""
    with _refused():
        image.load()
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            del image.info["transparency"]  # it changes no colour, and converting with it warns
        return _eight_bits(image)


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """Makes whatever Pillow raises a DecodeError: it raises nearly everything on hostile bytes."""
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:
        words = re.sub(r" ?<_io.BytesIO object at 0x[0-9a-f]+>", "", one_line(error))[:200]
        raise DecodeError("undecodable_image", f"{type(error).__name__}: {words}") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _scaled(image, 65535.0)
    return _scaled(image, 1.0) if image.mode == "F" else image


def _scaled(image: Image.Image, white: float) -> Image.Image:
    """8-bit greyscale of which `white` is 255; what lies outside is clipped."""
    values = np.asarray(image, dtype=np.float64) * (255.0 / white)
    return Image.fromarray(np.clip(np.nan_to_num(values), 0, 255).round().astype(np.uint8))


def decode_caption(raw: bytes | None) -> tuple[str | None, list[str]]:
    """A caption and the names of what was mended; None for an absent or blank one."""
    if raw is None:
        return None, ["missing_caption"]
    try:
        text, mended = raw.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        text, mended = raw.decode("utf-8-sig", "replace"), ["bad_utf8"]
    text = text.strip()
    return (text, mended) if text else (None, [*mended, "missing_caption"])


def decode_json(raw: bytes | None) -> tuple[dict[str, Any], list[str]]:
    """A side-car's fields and the names of what was mended.

    What is no JSON object, or nested deeper than MAX_DEPTH, is kept as text under "_raw". NaN and
    infinities, which JSON does not know but Python writes, become null; half surrogates, which
    UTF-8 cannot carry, U+FFFD.
    """
    if raw is None:
        return {}, []
    try:
        text, mended = raw.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        text, mended = raw.decode("utf-8-sig", "replace"), ["bad_utf8"]
    try:
        found = _clean(json.loads(text))
    except (ValueError, RecursionError):
        found = None
    return (found, mended) if isinstance(found, dict) else ({"_raw": text}, [*mended, "bad_json"])


def _clean(value: Any, depth: int = 0) -> Any:
    """A parsed value that strict JSON and UTF-8 can hold; RecursionError if it is nested too deep."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_clean(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_clean(name): _clean(item, depth + 1) for name, item in value.items()}
    return value
