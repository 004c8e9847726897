"""Encoded images to a model's pixels: `exact` bit for bit, `fast` near enough to give the same vectors."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_batch.encoders import transforms
from clip_batch.errors import DecodeError
from clip_batch.samples.decode import open_image, read_header
from tests import corpus

pytestmark = pytest.mark.slow

LIMIT = 10**8
SIZES = [(64, 64), (256, 256), (683, 512), (1224, 816), (512, 768), (97, 61)]
ODD, BAD = corpus.odd_images(), corpus.bad_images()


def transform(side: int = 64, **options: Any) -> Any:
    from open_clip.transform import image_transform

    return image_transform(side, is_train=False, **options)


def prepare(mode: str, whole: Any) -> Callable[[bytes, int], np.ndarray]:
    from clip_batch.encoders import preprocess

    return preprocess.from_transform(whole, mode).prepare


@cache
def demo(mode: str) -> Any:
    from clip_batch import encoders

    return encoders.load(encoders.resolve("demo", preprocess=mode), "cpu")


@cache
def demo_images() -> list[bytes]:
    from clip_batch.demo import data

    images: list[bytes] = data.load()["image"].to_pylist()[::40]
    return images


def pictures(width: int, height: int) -> list[bytes]:
    """Demo pictures, enlarged, as JPEGs of that size."""
    found = []
    for image in demo_images():
        large = Image.open(io.BytesIO(image)).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        found.append(corpus.encode(large, quality=92))
    return found


def odd_sizes() -> dict[str, bytes]:
    sizes = [(1, 1), (1, 9), (63, 64), (64, 65), (65, 200), (201, 67), (127, 3)]
    return {f"{w}x{h}.jpg": corpus.encode(corpus.picture(w).resize((w, h))) for w, h in sizes}


@pytest.mark.parametrize("options", [{}, {"resize_mode": "squash"}, {"interpolation": "bilinear"}])
@pytest.mark.parametrize("name", sorted(ODD) + sorted(odd_sizes()))
def test_exact_is_open_clips_own_bit_for_bit(name: str, options: dict[str, str]) -> None:
    import torch

    from clip_batch.encoders import preprocess

    whole, data = transform(32, **options), {**ODD, **odd_sizes()}[name]
    found = prepare("exact", whole)(data, LIMIT)
    assert (found.dtype, found.shape) == (np.uint8, (3, 32, 32))
    last = transforms.split(whole)[1]
    assert last is not None
    normalized = preprocess.normalizer(last, torch.device("cpu"))(torch.from_numpy(np.stack([found])))
    assert normalized.dtype == torch.float32
    assert torch.equal(normalized[0], whole(open_image(data, LIMIT)))


@pytest.mark.parametrize("name", ["alpha.png", "grey_alpha.png", "palette.png", "transparent_palette.png", "cmyk.jpg"])
def test_what_pillow_resizes_in_its_own_way_is_left_to_it(name: str) -> None:
    whole = transform(50)
    assert np.array_equal(prepare("fast", whole)(ODD[name], LIMIT), prepare("exact", whole)(ODD[name], LIMIT))


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("name", sorted(BAD))
def test_what_is_refused_is_refused_alike(name: str, mode: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(DecodeError) as expected:
        open_image(data, LIMIT)
    with pytest.raises(DecodeError) as caught:
        prepare(mode, transform())(data, LIMIT)
    assert (caught.value.reason, str(caught.value)) == (reason, str(expected.value))


def test_the_jpeg_decoder_agrees_with_pillow_or_leaves_it_to_pillow() -> None:
    from clip_batch.encoders import preprocess

    draw = np.random.default_rng(0)
    noisy = Image.fromarray(draw.integers(0, 256, (61, 47, 3), dtype=np.uint8))
    ways: list[dict[str, Any]] = [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"keep_rgb": True}]
    ways += [{"restart_marker_blocks": 4}, {"quality": 100}]
    whole = [corpus.encode(noisy, **options) for options in ways] + [corpus.encode(noisy.convert("L"))]
    broken = []
    for data in whole:
        for _ in range(40):
            broken.append(data[: draw.integers(1, len(data))])
            flipped = bytearray(data)
            flipped[draw.integers(len(data))] ^= 1 << draw.integers(8)
            broken.append(bytes(flipped))
    taken = 0
    for data in whole + broken + [data[:-cut] for data in whole for cut in (1, 2, 3)]:
        try:
            expected = open_image(data, LIMIT)
        except DecodeError:
            with pytest.raises(DecodeError):
                prepare("fast", transform())(data, LIMIT)
            continue
        found = preprocess._decode_jpeg(data)
        if found is not None and expected.format == "JPEG" and expected.mode in ("RGB", "L"):
            assert np.array_equal(found, np.asarray(expected.convert("RGB")))
            taken += 1
    assert taken > 100
    assert all(preprocess._decode_jpeg(data) is not None for data in whole)


def test_a_phones_jpeg_of_several_pictures_is_decoded_as_a_jpeg() -> None:
    from clip_batch.encoders import preprocess

    first, second = (Image.open(io.BytesIO(data)).convert("RGB") for data in demo_images()[:2])
    several = corpus.encode(first, "MPO", save_all=True, append_images=[second])
    found = preprocess._decode_jpeg(several)
    assert read_header(several, LIMIT).format == "MPO"
    assert preprocess._jpeg_header(several, LIMIT, False) == (first.height, first.width, 1)
    assert found is not None
    assert np.array_equal(found, np.asarray(open_image(several, LIMIT)))


@pytest.mark.parametrize("size", [*SIZES, (64, 65), (65, 64), (333, 224), (225, 449), (20, 3000)])
@pytest.mark.parametrize("options", [{}, {"resize_mode": "squash"}, {"interpolation": "bilinear"}])
def test_fast_sees_the_same_place_at_the_same_scale(size: tuple[int, int], options: dict[str, str]) -> None:
    """A ramp shows any shift: half a pixel of the result would be several levels."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([across, down, (across + down) / 2], -1).astype(np.uint8))
    data = corpus.encode(image, "PNG")
    for side in (64, 51):
        fast, exact = (prepare(mode, transform(side, **options))(data, LIMIT) for mode in ("fast", "exact"))
        assert fast.shape == exact.shape == (3, side, side)
        assert np.abs(fast.astype(int) - exact).max() <= 1


def likeness(data: list[bytes]) -> dict[str, float]:
    """How near `fast` is to `exact` over pictures: in pixels, and in the demo model's vectors."""
    fast, exact = (np.stack([demo(mode).preprocess(image, LIMIT) for image in data]) for mode in ("fast", "exact"))
    difference = np.abs(fast.astype(int) - exact)
    cosine = (demo("exact").encode_images(fast) * demo("exact").encode_images(exact)).sum(1)
    squares = float((difference.astype(float) ** 2).mean())
    return {
        "equal": float((difference == 0).mean()),
        "most": int(difference.max()),
        "psnr": 10 * np.log10(255**2 / squares) if squares else np.inf,
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
    }


@pytest.mark.parametrize("size", SIZES)
def test_fast_gives_the_vectors_of_exact(size: tuple[int, int]) -> None:
    found = likeness(pictures(*size))
    print(size, found)
    assert found["equal"] > 0.95
    assert found["most"] <= 2
    assert found["psnr"] > 55
    assert found["cosine_mean"] >= 0.9999
    assert found["cosine_min"] >= 0.999


def test_fast_and_exact_are_equal_where_nothing_is_resized() -> None:
    assert likeness(demo_images())["equal"] == 1


def test_an_image_smaller_than_the_crop_is_padded_alike() -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    steps = [Resize(11, InterpolationMode.BICUBIC), CenterCrop((15, 12)), ToTensor(), Normalize([0.5] * 3, [0.5] * 3)]
    for size in ((40, 40), (61, 40), (11, 11)):
        data = corpus.encode(corpus.picture(1, 20).resize(size))
        fast, exact = (prepare(mode, Compose(steps))(data, LIMIT).astype(int) for mode in ("fast", "exact"))
        assert fast.shape == exact.shape == (3, 15, 12)
        assert np.abs(fast - exact).max() <= 2
        assert not fast[:, :2].any() and not fast[:, 13:].any() and fast[:, 2:13].any()


def test_a_transform_that_fast_does_not_know_is_refused_by_name() -> None:
    from clip_batch.errors import EncoderError

    for options in ({"resize_mode": "longest"}, {"side": (64, 32)}):
        with pytest.raises(EncoderError, match="--preprocess exact"):
            prepare("fast", transform(**options))  # type: ignore[arg-type]
        assert prepare("exact", transform(**options))(corpus.jpeg(), LIMIT).dtype == np.uint8  # type: ignore[arg-type]


def test_a_transform_that_ends_otherwise_keeps_its_floats() -> None:
    from torchvision.transforms import Compose

    from clip_batch.encoders import transforms

    whole = transform()
    odd = Compose([*whole.transforms, lambda tensor: tensor * 2])
    assert transforms.split(odd)[1] is None
    found = prepare("exact", odd)(corpus.jpeg(), LIMIT)
    assert np.array_equal(found, odd(open_image(corpus.jpeg(), LIMIT)).numpy())
