"""What image files carry beside their pixels: chunks that may break them, and the EXIF orientation."""

from __future__ import annotations

from PIL import Image

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")

_TURNS = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
"""What makes an image of EXIF orientation 2, 3, ... 8 upright."""

ORIENTATION = 0x0112
"""The EXIF tag of the orientation."""


def pixels_alone(data: bytes | memoryview) -> bytes | None:
    """A PNG or JPEG without what no pixel depends on (text, profiles, EXIF); None if there is nothing to leave out.

    Pillow refuses images for text that is large or for a checksum of a chunk that nobody needs.
    """
    if data[:8] == _PNG:
        return _png(memoryview(data))
    return _jpeg(memoryview(data)) if data[:2] == b"\xff\xd8" else None


def _png(data: memoryview) -> bytes | None:
    """The chunks of a PNG that its pixels need, those of an animation left out."""
    kept, at = [data[:8]], 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in _PNG_CHUNKS:
            kept.append(data[at:end])
        at = end
    plain = b"".join(kept)
    return plain if len(plain) < len(data) else None


def _jpeg(data: memoryview) -> bytes | None:
    """A JPEG without comments and application segments, but for Adobe's, which tells the colours."""
    kept, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xEE or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[at:end])
        at = end
    plain = b"".join([*kept, data[at:]])
    return plain if len(plain) < len(data) else None


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1, which is upright, where EXIF is absent or makes no sense."""
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # Pillow raises nearly every type on hostile bytes
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """A loaded image made upright."""
    return image if orientation == 1 else image.transpose(_TURNS[orientation - 2])
