"""The header of a plain JPEG, read without Pillow: what it says, and that Pillow says the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from clip_batch.errors import DecodeError
from clip_batch.samples import sizes
from clip_batch.samples.decode import JPEGS, read_header
from clip_batch.samples.jpeg import plain_size
from clip_batch.samples.metadata import orientation
from tests import corpus

LIMIT = 10**6
EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "progressive": {"progressive": True},
    "full colour": {"subsampling": 0},
    "rgb": {"keep_rgb": True},
    "restarts": {"restart_marker_blocks": 4},
    "annotated": {"icc_profile": bytes(300), "comment": b"a cat", "exif": EXIF[6:]},
}


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2, "big") + content


def with_segment(added: bytes) -> bytes:
    data = corpus.encode(corpus.picture(1, 40))
    return data[:2] + added + data[2:]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_jpegs_are_known_by_their_header(kind: str) -> None:
    image = corpus.picture(1, 40).resize((61, 47))
    data = corpus.encode(image, **KINDS[kind])
    assert plain_size(data, LIMIT) == plain_size(memoryview(data), LIMIT) == (47, 61)
    assert plain_size(data, 61 * 47) == (47, 61)
    assert plain_size(data, 61 * 47 - 1) is None
    assert plain_size(corpus.encode(image.convert("L"), **KINDS[kind]), LIMIT) == (47, 61)


@pytest.mark.parametrize(
    "added",
    [
        segment(0xEE, b"Adobe"),
        b"\xff\x01",
        b"\xff\xd0",
        b"\xff\xff",
        b"\0",
        segment(0xDC, b"\0\x28"),
        segment(0xC0, bytes((8, 0, 9, 0, 9, 1, 1, 0x11, 0))),
        segment(0xC9, bytes((8, 0, 9, 0, 9, 1, 1, 0x11, 0))),
    ],
)
def test_what_is_unusual_is_left_to_pillow(added: bytes) -> None:
    assert plain_size(with_segment(added), LIMIT) is None


def test_other_images_are_left_to_pillow() -> None:
    picture = corpus.picture(1, 40)
    for data in (b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", corpus.encode(picture, "PNG")):
        assert plain_size(data, LIMIT) is None
    assert plain_size(corpus.encode(picture.convert("CMYK")), LIMIT) is None
    data = corpus.encode(picture)
    assert plain_size(data[: data.index(b"\xff\xda")], LIMIT) is None
    assert plain_size(corpus.encode(Image.new("RGB", (sizes.MAX_ASPECT + 1, 1))), LIMIT) is None


def test_an_orientation_is_left_to_pillow_where_it_is_applied() -> None:
    turned = with_segment(segment(0xE1, EXIF))
    assert orientation(read_header(turned, LIMIT)) == 6
    assert plain_size(turned, LIMIT) == (40, 40)
    assert plain_size(turned, LIMIT, upright=True) is None
    assert plain_size(with_segment(b""), LIMIT, upright=True) == (40, 40)


def test_memory_that_a_progressive_jpeg_might_need_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = corpus.encode(corpus.picture(1, 40))
    monkeypatch.setattr(sizes, "LEAST", 0)
    assert plain_size(data, 40 * 40) is None  # ten bytes a pixel are more than eight for each of max_pixels
    assert plain_size(data, 50 * 40) == (40, 40)


def mutated(draw: np.random.Generator, data: bytes) -> bytes:
    """A JPEG with a few bytes of its header changed, or with a segment added."""
    if draw.random() < 0.3:
        content = [
            b"Adobe",
            b"Adobe\0d\0\0\0\0\1",
            b"JFIF\0",
            EXIF,
            b"ICC_PROFILE\0",
            b"Photoshop 3.0\x008BIM",
            b"MPF\0x",
        ]
        added = segment(int(draw.choice([0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE])), content[draw.integers(len(content))])
        return data[:2] + added + data[2:]
    changed = bytearray(data)
    for _ in range(draw.integers(1, 4)):
        at = draw.integers(min(len(data), 700))
        changed[at] = draw.choice([0, 1, 255, changed[at] ^ 1, draw.integers(256)])
    return bytes(changed)


def test_pillow_agrees_about_every_jpeg_that_is_decoded_without_it() -> None:
    draw, taken = np.random.default_rng(0), 0
    image = corpus.picture(1, 24).resize((33, 25))
    whole = [corpus.encode(image, **options) for options in KINDS.values()]
    whole += [corpus.encode(image.convert(mode)) for mode in ("L", "CMYK")]
    whole.append(corpus.encode(image, "MPO", save_all=True, append_images=[image]))
    for _ in range(3000):
        data = mutated(draw, whole[draw.integers(len(whole))])
        size = plain_size(data, LIMIT, upright=bool(draw.integers(2)))
        try:
            simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            continue
        if size:
            header = read_header(data, LIMIT)
            assert (header.height, header.width) == size
            assert header.format in JPEGS and header.mode in ("RGB", "L")
            taken += 1
        if plain_size(data, LIMIT, upright=True):
            assert orientation(read_header(data, LIMIT)) == 1
    assert taken > 500


def test_a_jpeg_that_pillow_refuses_for_its_adobe_segment_is_refused() -> None:
    data = with_segment(segment(0xEE, b"Adobe"))
    assert simplejpeg.decode_jpeg(data).shape == (40, 40, 3)
    with pytest.raises(DecodeError):
        read_header(data, LIMIT)
