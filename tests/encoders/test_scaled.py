"""`--preprocess scaled`: large JPEGs decoded to fewer pixels, everything else as `fast` has it."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_batch.cli import main
from clip_batch.errors import DecodeError, EncoderError
from clip_batch.plan.plan import load_plan
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec
from tests import corpus
from tests.encoders.test_preprocess import BAD, LIMIT, ODD, demo, demo_images, prepare, transform

pytestmark = pytest.mark.slow

SIDES = st.integers(1, 200)


def enlarged(image: Image.Image, width: int, height: int, grain: float = 4) -> Image.Image:
    """A picture made large, with grain, as enlarging alone leaves no detail that fewer pixels could lose."""
    large = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), np.float32)
    noise = np.random.default_rng(width).normal(0, grain, large.shape)
    return Image.fromarray((large + noise).clip(0, 255).round().astype(np.uint8))


@cache
def photos(width: int, height: int) -> list[bytes]:
    images = [Image.open(io.BytesIO(image)) for image in demo_images()[::4]]
    return [corpus.encode(enlarged(image, width, height), quality=90) for image in images]


@settings(max_examples=200)
@given(SIDES, SIDES, st.integers(1, 40), st.integers(1, 40), st.booleans())
@example(7, 7, 1, 1, False)
@example(1, 200, 1, 1, True)
def test_what_is_decoded_is_never_less_than_the_gap_asks(
    height: int, width: int, side: int, other: int, squash: bool
) -> None:
    from clip_batch.encoders import preprocess

    size = preprocess.resized_size([side, other] if squash else [side], height, width)
    n = preprocess.eighths(height, width, size, 2.0)
    sides = -(-height * n // 8), -(-width * n // 8)
    found = preprocess._decode_jpeg(corpus.encode(Image.new("RGB", (width, height), "teal")), *sides)
    assert found is not None and found.shape == (*sides, 3)
    if n < 8:
        assert all(got >= 2 * least for got, least in zip(found.shape[:2], size, strict=True))
    if n > 1:
        assert any(n / 2 * whole < 8 * 2 * least for whole, least in zip((height, width), size, strict=True))


@settings(max_examples=200)
@given(SIDES, SIDES, st.lists(st.integers(1, 300), min_size=1, max_size=2))
def test_the_resized_size_is_torchvisions(height: int, width: int, size: list[int]) -> None:
    import torch
    from torchvision.transforms import InterpolationMode, Resize

    from clip_batch.encoders import preprocess

    if max(height, width) > 20 * min(height, width):
        return
    made = Resize(size if len(size) == 2 else size[0], InterpolationMode.NEAREST)(torch.zeros(1, height, width))
    assert preprocess.resized_size(size, height, width) == list(made.shape[1:])


@settings(max_examples=100)
@given(SIDES, SIDES, st.integers(1, 64), st.sampled_from(["shortest", "squash"]))
def test_images_under_twice_the_gap_are_as_fast_has_them(width: int, height: int, side: int, mode: str) -> None:
    data = corpus.encode(corpus.picture(width).resize((width, height)))
    scaled, fast = (prepare(one, transform(side, resize_mode=mode))(data, LIMIT) for one in ("scaled", "fast"))
    assert scaled.shape == fast.shape == (3, side, side)
    if min(width, height) < 4 * side:
        assert np.array_equal(scaled, fast)


@pytest.mark.parametrize("size", [(1001, 701), (515, 1999), (1030, 1030), (2049, 513)])
@pytest.mark.parametrize("options", [{}, {"resize_mode": "squash"}, {"interpolation": "bilinear"}])
def test_it_sees_the_same_place_at_the_same_scale(size: tuple[int, int], options: dict[str, str]) -> None:
    """A ramp shows any shift: half a pixel of the result would be two levels."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([across, down, (across + down) / 2], -1).astype(np.uint8))
    data = corpus.encode(image, quality=100, subsampling=0)
    for side in (64, 51):
        scaled, exact = (prepare(mode, transform(side, **options))(data, LIMIT) for mode in ("scaled", "exact"))
        assert scaled.shape == exact.shape == (3, side, side)
        assert not np.array_equal(scaled, prepare("fast", transform(side, **options))(data, LIMIT))
        assert np.abs(scaled.astype(int) - exact).max() <= 1


@pytest.mark.parametrize("size", [(512, 512), (683, 512), (1001, 1501), (2048, 1536)])
def test_it_gives_the_vectors_of_exact(size: tuple[int, int]) -> None:
    scaled, exact = (
        np.stack([demo(mode).preprocess(image, LIMIT) for image in photos(*size)]) for mode in ("scaled", "exact")
    )
    difference = scaled.astype(float) - exact
    cosine = (demo("exact").encode_images(scaled) * demo("exact").encode_images(exact)).sum(1)
    psnr = 10 * np.log10(255**2 / (difference**2).mean())
    print(size, psnr, np.abs(difference).max(), cosine.mean(), cosine.min())
    assert psnr > 48
    assert np.abs(difference).max() <= 8
    assert cosine.mean() >= 0.9999
    assert cosine.min() >= 0.9995


KINDS: dict[str, dict[str, Any]] = {
    "progressive": {"progressive": True},
    "full colour": {"subsampling": 0},
    "halved colour": {"subsampling": 1},
    "rgb": {"keep_rgb": True},
    "restarts": {"restart_marker_blocks": 4},
}


@pytest.mark.parametrize("kind", [*KINDS, "grey"])
def test_every_kind_of_jpeg_is_decoded_to_less(kind: str) -> None:
    from clip_batch.encoders import preprocess

    image = enlarged(corpus.picture(1, 16), 700, 512).convert("L" if kind == "grey" else "RGB")
    data = corpus.encode(image, quality=95, **KINDS.get(kind, {}))
    found = preprocess._decode_jpeg(data, 128, 175)
    assert found is not None and found.shape == (128, 175, 3)
    scaled, exact = (prepare(mode, transform())(data, LIMIT).astype(int) for mode in ("scaled", "exact"))
    assert np.abs(scaled - exact).max() <= 4


def test_what_is_no_plain_jpeg_is_as_fast_has_it() -> None:
    large = enlarged(corpus.picture(2, 16), 700, 512)
    others = {
        "cmyk.jpg": corpus.encode(large.convert("CMYK")),
        "large.png": corpus.encode(large, "PNG"),
        "large.webp": corpus.encode(large, "WEBP"),
        "palette.png": corpus.encode(large.quantize(64), "PNG"),
        "grey16.png": corpus.encode(Image.fromarray(np.arange(700 * 512, dtype=np.uint16).reshape(512, 700)), "PNG"),
    }
    for name, data in {**ODD, **others}.items():
        scaled, fast = (prepare(mode, transform(32))(data, LIMIT) for mode in ("scaled", "fast"))
        assert np.array_equal(scaled, fast), name


def outcome(mode: str, data: bytes) -> np.ndarray | tuple[str, str]:
    """Pixels of side 32, or why there are none."""
    try:
        return prepare(mode, transform(32))(data, LIMIT)
    except DecodeError as error:
        return error.reason, error.message


def test_what_is_refused_is_refused_as_by_fast() -> None:
    """Cut and changed JPEGs too; those that Pillow takes though they are not clean are not scaled."""
    from clip_batch.encoders import preprocess

    draw, image = np.random.default_rng(0), enlarged(corpus.picture(3, 16), 307, 261)
    files = [data for data, _ in BAD.values()]
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 8}):
        whole = corpus.encode(image, **options)
        for _ in range(80):
            changed = bytearray(whole)
            changed[draw.integers(len(whole))] ^= 1 << draw.integers(8)
            files += [whole[: draw.integers(1, len(whole))], bytes(changed)]
    unclean = 0
    for data in files:
        fast, scaled = (outcome(mode, data) for mode in ("fast", "scaled"))
        if isinstance(fast, tuple) or isinstance(scaled, tuple):
            assert fast == scaled
        elif preprocess._decode_jpeg(data) is None:
            assert np.array_equal(fast, scaled)
            unclean += 1
    assert unclean > 5


def test_pixels_are_counted_before_they_are_scaled() -> None:
    data = corpus.jpeg(1, 700)
    assert prepare("scaled", transform())(data, 700**2).shape == (3, 64, 64)
    with pytest.raises(DecodeError) as caught:
        prepare("scaled", transform())(data, 700**2 - 1)
    assert caught.value.reason == "too_many_pixels"


def test_a_plan_of_before_keeps_its_fingerprint_and_another_way_has_another() -> None:
    fast, exact, scaled = (EncoderSpec("m", "p", "w", mode).fingerprint for mode in ("fast", "exact", "scaled"))
    assert (fast, exact) == ("11d2bab0f0d0eefa", "91e005e043ef6b8c")
    assert scaled not in (fast, exact)


def test_a_way_that_nobody_knows_is_refused() -> None:
    with pytest.raises(EncoderError, match="no preprocessing is called 'faster': there are exact, fast, scaled"):
        prepare("faster", transform())


def test_a_transform_that_only_exact_knows_is_refused() -> None:
    from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

    last = [ToTensor(), Normalize([0.5] * 3, [0.5] * 3)]
    nearest, bounded = (
        Compose([Resize(8, **options), *last])
        for options in ({"interpolation": InterpolationMode.NEAREST}, {"max_size": 9})  # type: ignore[dict-item]
    )
    for mode, whole in (("scaled", nearest), ("scaled", bounded), ("fast", bounded)):
        with pytest.raises(EncoderError, match="--preprocess exact"):
            prepare(mode, whole)
    assert prepare("fast", nearest)(corpus.jpeg(), LIMIT).shape == (3, 8, 8)


def test_plan_and_embed(tmp_path: Path, out: str) -> None:
    tar = corpus.write_tar(
        str(tmp_path / "a.tar"), [(f"{number}.jpg", data) for number, data in enumerate(photos(683, 512))]
    )
    assert main(["plan", "--input", tar, "--output", out, "--model", "demo", "--preprocess", "scaled"]) == 0
    assert main(["embed", "--output", out, "--device", "cpu", "--no-progress"]) == 0
    assert load_plan(Store(out)).encoder.preprocess == "scaled"
    rows = np.load(next(Path(out, "img_emb").iterdir())).astype(np.float32)
    preprocess = np.stack([demo("scaled").preprocess(data, LIMIT) for data in photos(683, 512)])
    assert np.abs(rows - demo("exact").encode_images(preprocess)).max() < 1e-3
