"""Images, captions and JSON: the documented rule for each unusual or bad input."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_batch.errors import DecodeError
from clip_batch.samples.decode import open_image
from tests import corpus

LIMIT = 178_956_970
ODD, BAD = corpus.odd_images(), corpus.bad_images()


def rgb(data: bytes) -> np.ndarray:
    return np.asarray(open_image(data, LIMIT).convert("RGB"))


@pytest.mark.parametrize("name", sorted(set(ODD) - {"grey16.png", "transparent_palette.png"}))
def test_pixels_and_mode_are_pillows(name: str) -> None:
    with Image.open(BytesIO(ODD[name])) as reference:
        image = open_image(memoryview(ODD[name]), LIMIT)
        assert (image.mode, image.size) == (reference.mode, reference.size)
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(reference.convert("RGB")))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ODD))
def test_every_odd_image_passes_open_clips_transform(name: str) -> None:
    from open_clip.transform import image_transform

    tensor = image_transform(32, is_train=False)(open_image(ODD[name], LIMIT))
    assert tuple(tensor.shape) == (3, 32, 32)
    assert bool(tensor.isfinite().all())


def test_a_transparent_palette_converts_without_a_warning() -> None:
    with Image.open(BytesIO(ODD["transparent_palette.png"])) as reference:
        assert isinstance(reference.info["transparency"], bytes)
        expected = np.asarray(reference.convert("RGBA"))[..., :3]
    assert np.array_equal(rgb(ODD["transparent_palette.png"]), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    image = open_image(corpus.grey16(kind), LIMIT)
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image).ravel(), np.arange(256))


@pytest.mark.parametrize("name", ["gif.jpg", "animated.webp", "animated.png"])
def test_the_first_frame_of_an_animation(name: str) -> None:
    assert (rgb(ODD[name]) == (255, 0, 0)).all()


def test_exif_rotation_is_applied_by_choice() -> None:
    assert open_image(ODD["rotated.jpg"], LIMIT).size == (64, 32)
    assert open_image(ODD["rotated.jpg"], LIMIT, upright=True).size == (32, 64)


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_images_say_why(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(DecodeError) as caught:
        open_image(data, LIMIT)
    assert caught.value.reason == reason
    assert caught.value.message
    assert "\n" not in caught.value.message
    assert " at 0x" not in caught.value.message


def test_the_bound_on_pixels_is_ours_alone() -> None:
    data = corpus.encode(Image.new("1", (14_000, 14_000)), "PNG")  # more than Pillow's own limit
    assert open_image(data, 14_000**2).size == (14_000, 14_000)
    with pytest.raises(DecodeError, match="14000 x 14000 pixels"):
        open_image(data, 14_000**2 - 1)


@settings(max_examples=150)
@given(st.sampled_from(sorted(ODD)), st.integers(0, 600), st.binary(max_size=20))
def test_hostile_bytes_raise_only_decode_error(name: str, at: int, noise: bytes) -> None:
    data = ODD[name][:at] + noise + ODD[name][at + len(noise) :]
    with contextlib.suppress(DecodeError):
        image = open_image(data, 10**6)
        assert image.convert("RGB").size == image.size


def test_threads_decode_what_one_decodes() -> None:
    names = sorted(ODD) * 6
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: rgb(ODD[name]), names))
    assert all(np.array_equal(array, rgb(ODD[name])) for array, name in zip(found, names, strict=True))
