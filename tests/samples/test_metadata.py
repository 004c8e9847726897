"""What stands beside the pixels: text, profiles and EXIF never refuse a picture; orientation turns it by choice."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from clip_batch.errors import DecodeError
from clip_batch.samples import metadata
from clip_batch.samples.decode import open_image, read_header
from tests import corpus

LIMIT = 10**8
PICTURE = corpus.picture(5).resize((24, 16))


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png_with(*chunks: bytes, last: bool = False) -> bytes:
    """A PNG with more chunks, after the header or before the end."""
    plain = corpus.encode(PICTURE, "PNG")
    at = len(plain) - 12 if last else 33
    return plain[:at] + b"".join(chunks) + plain[at:]


def text(size: int) -> bytes:
    return chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(size).replace(b"\0", b"x")))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "chunks",
    [
        [text(2_500_000)],
        [chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"x" * 2_500_000))],
        [text(900_000)] * 80,
        [chunk(b"tEXt", b"prompt\0" + b"x" * 3_000_000)],
        [chunk(b"tEXt", b"prompt\0x", checksum=1)],
        [chunk(b"iCCP", b"big\0\0" + zlib.compress(bytes(2_000_000)))],
        [chunk(b"iCCP", b"other\0\7" + zlib.compress(b"x"))],
        [chunk(b"iCCP", b"no profile")],
        [chunk(b"iCCP", b"p\0\0" + b"not zlib")],
        [chunk(b"eXIf", b"no EXIF")],
        [chunk(b"eXIf", b"II*\0\xff\xff\xff\xff", checksum=2)],
        [chunk(b"gAMA", b"")],
        [chunk(b"pHYs", b"1")],
    ],
)
def test_chunks_beside_the_pixels_never_refuse_a_png(chunks: list[bytes], last: bool) -> None:
    for upright in (False, True):
        assert np.array_equal(np.asarray(open_image(png_with(*chunks, last=last), LIMIT, upright)), np.asarray(PICTURE))


def test_text_takes_bounded_memory() -> None:
    bomb = png_with(*[text(10**6)] * 300)
    tracemalloc.start()
    open_image(bomb, LIMIT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150 * 2**20


def test_a_second_header_does_not_make_a_png_larger_than_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, original = [], PngImagePlugin.PngImageFile.load_prepare

    def prepare(image: PngImagePlugin.PngImageFile) -> None:
        sizes.append(image.size)
        original(image)

    plain = corpus.encode(PICTURE, "PNG")
    large = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 24, 16, 0, 0, 1, 1, 0, 0)) + chunk(b"fdAT", b"\0\0\0\1broken")
    data = plain[:33] + chunk(b"acTL", struct.pack(">II", 1, 0)) + frame + large + plain[33:]
    assert read_header(data, LIMIT).size == (24, 16)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", prepare)
    with pytest.raises(DecodeError):
        open_image(data, LIMIT)
    assert sizes == [(24, 16)]


def test_colours_and_transparency_are_kept() -> None:
    data = corpus.transparent_palette()
    broken = data[:33] + chunk(b"tEXt", b"x", checksum=3) + data[33:]
    assert np.array_equal(np.asarray(open_image(broken, LIMIT)), np.asarray(open_image(data, LIMIT)))


def test_a_png_broken_in_its_pixels_stays_refused() -> None:
    data = bytearray(png_with(text(2_500_000)))
    data[data.index(b"IDAT") + 8] ^= 255
    with pytest.raises(DecodeError, match="broken PNG"):
        open_image(bytes(data), LIMIT)


@pytest.mark.parametrize(
    "options",
    [
        {"icc_profile": b"not a profile" * 9000},
        {"exif": b"Exif\0\0no TIFF"},
        {"exif": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(30)},
        {"exif": b"Exif\0\0MM\0*\xff\xff\xff\xff"},
        {"comment": b"\xff" * 60_000},
        {"xmp": b"<x:xmpmeta tiff:Orientation='99'/>"},
    ],
)
def test_profiles_and_exif_never_refuse_a_jpeg(options: dict[str, Any]) -> None:
    data, plain = corpus.encode(PICTURE, **options), corpus.encode(PICTURE)
    for upright in (False, True):
        assert np.array_equal(np.asarray(open_image(data, LIMIT, upright)), np.asarray(open_image(plain, LIMIT)))
    left = metadata.pixels_alone(data)
    assert left is not None and np.array_equal(
        np.asarray(Image.open(io.BytesIO(left))), np.asarray(Image.open(io.BytesIO(data)))
    )


def test_adobes_mark_is_not_left_out() -> None:
    data = corpus.encode(PICTURE.convert("CMYK"), comment=b"x")
    left = metadata.pixels_alone(data)
    assert left is not None and b"Adobe" in left and b"x" * 1 in data and len(left) < len(data)


def rotated(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    return corpus.encode(PICTURE, kind, exif=exif.tobytes(), **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_by_choice(kind: str, orientation: int) -> None:
    data = rotated(kind, orientation)
    upright = np.asarray(open_image(data, LIMIT, upright=True).convert("RGB"))
    assert np.array_equal(upright, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")))
    assert upright.shape[:2] == ((24, 16) if orientation >= 5 else (16, 24))
    if kind != "TIFF":  # Pillow itself turns those
        assert np.array_equal(np.asarray(open_image(data, LIMIT)), np.asarray(Image.open(io.BytesIO(data))))


def test_orientation_behind_the_pixels_of_a_png() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png_with(chunk(b"eXIf", exif.tobytes()[6:]), last=True)
    assert open_image(data, LIMIT, upright=True).size == (16, 24)


@pytest.mark.parametrize("value", [0, 9, 77, 65535])
def test_orientations_that_do_not_exist_are_ignored(value: int) -> None:
    assert open_image(rotated("JPEG", value), LIMIT, upright=True).size == (24, 16)
    with Image.open(io.BytesIO(corpus.encode(PICTURE))) as image:
        assert metadata.orientation(image) == 1


def test_pillows_own_limits_stay_as_they_are() -> None:
    open_image(png_with(text(2_500_000)), LIMIT)
    assert PngImagePlugin.MAX_TEXT_CHUNK == 2**20
