"""Greyscale of more than 8 bits: which value is white, and how much memory it takes."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from clip_batch.samples import levels
from clip_batch.samples.decode import open_image
from tests import corpus

LIMIT = 10**8


def decoded(values: Any, kind: str = "TIFF", **options: Any) -> list[int]:
    image = open_image(corpus.encode(Image.fromarray(np.array([values])), kind, **options), LIMIT)
    assert image.mode == "L"
    found: list[int] = np.asarray(image).ravel().tolist()
    return found


def with_tag(tiff: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF in which a tag, a short number, has another value."""
    at = tiff.index(struct.pack("<HHI", tag, 3, 1)) + 8
    return tiff[:at] + struct.pack("<H", value) + tiff[at + 2 :]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([0, 0.5, 1.5], [0, 128, 255]),  # fractions that overshoot, as after a resize
        ([0, 100, 255], [0, 100, 255]),
        ([0, 12.4, 90], [0, 12, 90]),  # a dark picture of 0 to 255 stays dark
        ([0, 32768, 65535], [0, 128, 255]),
        ([0, 5e5, 1e6], [0, 128, 255]),
        ([-1, 0.5, 1], [0, 128, 255]),
        ([np.nan, np.inf, 100], [0, 255, 100]),
        ([-np.inf, np.nan, 0.5], [0, 0, 128]),
        ([0, 0, 0], [0, 0, 0]),
        ([np.nan, np.nan, np.nan], [0, 0, 0]),
    ],
)
def test_floats_are_scaled_by_what_is_there(values: list[float], expected: list[int]) -> None:
    assert decoded(np.array(values, "f4")) == expected
    assert decoded(np.array(values, "f4"), compression="tiff_lzw") == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 2], [0, 1, 2]),  # whole numbers are never fractions
        ([0, 100, 255], [0, 100, 255]),
        ([0, 300, 65535], [0, 1, 255]),
        ([0, 5 * 10**5, 10**6], [0, 128, 255]),
        ([-5, 0, 255], [0, 0, 255]),
    ],
)
def test_whole_numbers_of_32_bits_are_scaled_by_what_is_there(values: list[int], expected: list[int]) -> None:
    assert decoded(np.array(values, "i4")) == expected


def test_unsigned_numbers_are_not_negative() -> None:
    values = np.array([[0, 2**31, 2**32 - 1]], np.uint32).view(np.int32)
    data = with_tag(corpus.encode(Image.fromarray(values), "TIFF"), TiffImagePlugin.SAMPLEFORMAT, 1)
    assert np.asarray(open_image(data, LIMIT)).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
def test_sixteen_bits_have_their_own_white(kind: str) -> None:
    assert decoded(np.array([0, 255, 32768, 65535], np.uint16), kind) == [0, 1, 128, 255]
    assert decoded(np.array([0, 100, 255], np.uint16), kind) == [0, 0, 1]  # a dark picture stays dark
    pgm = b"P5 3 1 65535\n" + np.array([0, 100, 255], ">u2").tobytes()
    assert np.asarray(open_image(pgm, LIMIT)).tolist() == [[0, 0, 1]]


def test_big_endian_and_white_is_zero() -> None:
    big = corpus.encode(Image.fromarray(np.array([[0, 65535]], ">u2")), "TIFF")
    assert np.asarray(open_image(big, LIMIT)).tolist() == [[0, 255]]
    little = corpus.encode(Image.fromarray(np.array([[0, 65535]], np.uint16)), "TIFF")
    data = with_tag(little, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0)
    assert np.asarray(open_image(data, LIMIT)).tolist() == [[255, 0]]


@pytest.mark.parametrize("mode", ["F", "I", "I;16"])
def test_strips_give_what_one_gives(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((37, 23)) * (1 if mode == "F" else 60000)
    image = Image.fromarray(values.astype({"F": "f4", "I": "i4", "I;16": "u2"}[mode]))
    image.format = "TIFF"
    whole = np.asarray(levels.eight_bits(image))
    monkeypatch.setattr(levels, "STRIP", 100)
    assert np.array_equal(np.asarray(levels.eight_bits(image)), whole)


def test_what_else_a_tiff_holds_becomes_rgb() -> None:
    picture = corpus.picture(3)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
        data = corpus.encode(picture.convert(mode), "TIFF")
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(np.asarray(open_image(data, LIMIT).convert("RGB")), expected), mode


def test_inverted_cmyk_of_adobe_is_not_a_negative() -> None:
    data = corpus.encode(Image.new("RGB", (16, 16), (250, 20, 20)).convert("CMYK"), "JPEG", quality=100)
    red, green, blue = np.asarray(open_image(data, LIMIT).convert("RGB")).mean((0, 1))
    assert red > 200 and green < 60 and blue < 60
