"""Which images are too large to decode, by their header: in pixels, in shape, and in memory."""

from __future__ import annotations

import struct
from typing import Any

from PIL import Image

from clip_batch.errors import DecodeError

MAX_ASPECT = 1000
"""Largest ratio of the sides: a transform that resizes the shorter side would make gigabytes of longer images."""

BYTES_A_PIXEL = 8
"""Memory that decoding may take for each pixel of `max_pixels`."""

LEAST = 2**30
"""Memory in bytes that decoding may take however small `max_pixels` is."""

_NEEDS = {"WEBP": 17, "AVIF": 13, "HEIF": 13, "JPEG2000": 20}
"""Bytes per pixel, measured, of decoders that need more than Pillow's own 4: they decode the whole picture first."""

_PROGRESSIVE = 10
"""The same of progressive JPEGs, whose coefficients are all kept until the last scan."""

_ICON = b"\0\0\1\0"

_BITS, _SAMPLES, _STRIP_ROWS, _TILE_WIDTH, _TILE_LENGTH = 258, 277, 278, 322, 323
"""Tags of TIFF 6.0."""


def check(image: Image.Image, max_pixels: int) -> None:
    """DecodeError if an image, of which the header was read, is too large to decode."""
    width, height = image.size
    _check_pixels(width, height, max_pixels)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DecodeError("extreme_aspect", f"{width} x {height}: sides differ more than {MAX_ASPECT}-fold")
    memory, limit = decoding_memory(image), _most_memory(max_pixels)
    if memory > limit:
        name, most = image.format, f"{limit:,} ({BYTES_A_PIXEL} for each of --max-pixels)"
        raise DecodeError("too_many_pixels", f"{width} x {height} in {name} needs {memory:,} bytes, more than {most}")


def surely_fits(height: int, width: int, max_pixels: int) -> bool:
    """Whether `check` accepts every JPEG of this size, a progressive one too."""
    pixels = height * width
    fits = 0 < pixels <= max_pixels and _PROGRESSIVE * pixels <= _most_memory(max_pixels)
    return fits and max(height, width) <= MAX_ASPECT * min(height, width)


def check_icon(data: bytes | memoryview, max_pixels: int) -> None:
    """DecodeError if a picture in an icon (ICO) is too large: Pillow decodes it as it reads the header.

    The sizes in an icon's list end at 256; each picture says its own.
    """
    if bytes(data[:4]) != _ICON:
        return
    for entry in range(22, 6 + 16 * int.from_bytes(data[4:6], "little") + 1, 16):
        at = int.from_bytes(data[entry - 4 : entry], "little")
        order, first = (">", at + 16) if bytes(data[at : at + 4]) == b"\x89PNG" else ("<", at + 4)
        if first + 8 > len(data):
            continue  # Pillow says what is wrong with it
        width, height = map(abs, struct.unpack_from(f"{order}ii", data, first))
        _check_pixels(width, height, max_pixels)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DecodeError("too_many_pixels", f"{width} x {height} pixels, more than {max_pixels}")


def _most_memory(max_pixels: int) -> int:
    """Bytes that decoding an image may take."""
    return max(LEAST, BYTES_A_PIXEL * max_pixels)


def decoding_memory(image: Image.Image) -> int:
    """Bytes that decoding an image takes at most, by its header."""
    pixels = image.width * image.height
    if image.format == "TIFF":
        return 4 * pixels + _tiff_buffer(image)
    if image.info.get("progressive"):
        return _PROGRESSIVE * pixels
    return _NEEDS.get(image.format or "", 4) * pixels


def _tiff_buffer(image: Image.Image) -> int:
    """Bytes of a TIFF's largest strip or tile at its own depth, which are decoded at once."""
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    bits = tags.get(_BITS, (1,))
    samples = tags.get(_SAMPLES, len(bits))
    rows = min(tags.get(_STRIP_ROWS, image.height), image.height)
    pixels = tags.get(_TILE_WIDTH, image.width) * tags.get(_TILE_LENGTH, rows)
    return int(pixels * samples * max(bits) // 8)
