"""Smaller copies of images, for pages that show many of them."""

from __future__ import annotations

import io

from PIL import Image

from clip_batch.errors import DecodeError
from clip_batch.samples import kinds
from clip_batch.samples.decode import JPEGS, load_image, read_header
from clip_batch.samples.metadata import orientation

WIDTHS = (160, 320, 640, 1280, 2560)
"""Widths in pixels of the copies that are made; others are rounded up, so that a client cannot have any number made."""

TALLEST = 4
"""Most times its width that a copy is high: beyond, a strip of pixels would be as large as its original."""

SHOWN = ("jpeg", "png", "webp", "gif", "bmp", "avif")
"""Formats that browsers show."""

SMALL = 30_000
"""Bytes up to which an image that is narrow enough is its own copy."""

GAP = 2
"""A JPEG is decoded to at least this many times the size of the copy, which is then resized from that."""

QUALITY, PROFILE = 78, 4096
"""The quality of copies, and the size in bytes up to which a colour profile is copied."""


def rounded(width: int) -> int:
    """Return the smallest of `WIDTHS` that is at least `width`, or the largest.

    >>> rounded(200), rounded(9000)
    (320, 2560)
    """
    return next((one for one in WIDTHS if one >= width), WIDTHS[-1])


def thumbnail(data: bytes, width: int, max_pixels: int) -> bytes:
    """Return a copy of an image file, upright, at most `width` pixels wide and `TALLEST` times that high; JPEG or WebP.

    JPEGs are decoded at a fraction of their size. An image that is small already is returned as it is. Raises
    DecodeError if it cannot be decoded.
    """
    image = read_header(data, max_pixels)
    turn = orientation(image)
    across, down = image.size if turn < 5 else image.size[::-1]
    scale = min(1.0, width / across, TALLEST * width / down)
    if scale == 1 and len(data) <= SMALL and (kinds.picture(data) or "").lower() in SHOWN:
        return data
    size = max(1, round(across * scale)), max(1, round(down * scale))
    if image.format in JPEGS and scale < 1:
        wanted = size if turn < 5 else size[::-1]
        image.draft("RGB" if image.mode != "L" else "L", (GAP * wanted[0], GAP * wanted[1]))
    return _encode(_resize(load_image(image, data, upright=True), size))


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.mode not in ("RGB", "L", "RGBA"):
        clear = "A" in image.mode or "transparency" in image.info
        profile = image.info.get("icc_profile") if image.mode == "P" else None  # CMYK's fits no RGB
        image = image.convert("RGBA" if clear else "RGB")
        image.info["icc_profile"] = profile
    if size == image.size:
        return image
    resized = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=float(GAP))
    resized.info.update(image.info)
    return resized


def _encode(image: Image.Image) -> bytes:
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or len(profile) > PROFILE:
        profile = None
    sink = io.BytesIO()
    try:
        if image.mode == "RGBA":
            image.save(sink, "WEBP", quality=QUALITY, method=2, icc_profile=profile)
        else:
            image.save(sink, "JPEG", quality=QUALITY, optimize=True, icc_profile=profile, exif=b"")
    except (OSError, ValueError) as error:
        raise DecodeError("undecodable_image", f"no smaller copy can be made: {error}") from None
    return sink.getvalue()
