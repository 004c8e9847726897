"""Decoding images, with a rule for each kind of bad input; `texts` decodes what lies beside them."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import warnings
from collections.abc import Iterator
from functools import cache

from PIL import Image, UnidentifiedImageError

from clip_batch.errors import DecodeError, one_line
from clip_batch.samples import kinds, levels, metadata, sizes

# `read_header` counts pixels; Pillow's own limit would refuse images that `max_pixels` allows.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns of corrupt EXIF and the like, image by image; an image that decodes is used.
warnings.filterwarnings("ignore", module="PIL")

Image.init()
with contextlib.suppress(ImportError):
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # images are decoded side by side
_RASTER = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF", "TGA")
FORMATS = tuple(name for name in _RASTER if name in Image.OPEN)
"""Formats that are decoded, whatever the name of the file; not EPS and the like, which run programs."""

JPEGS = ("JPEG", "MPO")
"""Pillow's names for a JPEG: phones write MPO, a JPEG with a preview or a depth map after it."""


def open_image(data: bytes | memoryview, max_pixels: int, upright: bool = False) -> Image.Image:
    """Decode an image fully, as the model's transform expects it; DecodeError where that is not possible.

    Pixels and the memory that they need are bounded by the header, before decoding. Of an animation the first frame is
    decoded. With `upright`, EXIF orientation is applied. Greyscale of more than 8 bits becomes 8 bits (see `levels`).
    Text, profiles and EXIF that are too large or broken are left out.
    """
    return load_image(read_header(data, max_pixels), data, upright)


def read_header(data: bytes | memoryview, max_pixels: int) -> Image.Image:
    """Read only the header of an image; DecodeError if that shows that the image cannot be used."""
    with _decode_errors(data, known=False):
        sizes.check_icon(data, max_pixels)
        image = _opened(data)
        sizes.check(image, max_pixels)
        if image.format == "TIFF" and (raw := kinds.camera(image.tag_v2, data)):  # type: ignore[attr-defined]
            raise DecodeError("undecodable_image", raw)
        return image


def load_image(image: Image.Image, data: bytes | memoryview, upright: bool = False) -> Image.Image:
    """Decode the rest of an image that `read_header` returned for `data`; DecodeError where that is not possible."""
    with _decode_errors(data, known=True):
        try:
            image.load()
        except Exception:
            plain = metadata.pixels_alone(data) if image.format == "PNG" else None
            if plain is None:
                raise
            checked, image = image.size, Image.open(io.BytesIO(plain), formats=["PNG"])
            if image.size != checked:  # a second header, behind what was left out
                raise
            image.load()
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            del image.info["transparency"]  # it changes no colour, and Pillow warns when it converts it
        turn = metadata.orientation(image) if upright else 1
        return metadata.turned(levels.eight_bits(image), turn)


def _opened(data: bytes | memoryview) -> Image.Image:
    """The image of some bytes, with its header read."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:
        if kinds.is_heif(data) and _add_heif():
            return Image.open(io.BytesIO(data), formats=["HEIF"])
        plain = metadata.pixels_alone(data)
        if plain is None:
            raise
        return Image.open(io.BytesIO(plain), formats=FORMATS)


@cache
def _add_heif() -> bool:
    """Teach Pillow to read HEIC, if a library that does is installed."""
    for name in ("pillow_heif", "pi_heif"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name).register_heif_opener(thumbnails=False, decode_threads=1)
            return True
    return False


@contextlib.contextmanager
def _decode_errors(data: bytes | memoryview, known: bool) -> Iterator[None]:
    """Turn any error into a DecodeError: Pillow raises nearly every type on hostile bytes.

    `known` is whether a decoder knew the format.
    """
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:
        problem = re.sub(r" ?<_io.BytesIO object at 0x[0-9a-f]+>", "", one_line(error))[:200]
        known = known or not isinstance(error, UnidentifiedImageError) or (kinds.is_heif(data) and _add_heif())
        message = kinds.explain(data, f"{type(error).__name__}: {problem}", known)
        raise DecodeError("undecodable_image", message) from None
