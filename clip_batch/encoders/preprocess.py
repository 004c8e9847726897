"""Encoded images to a model's pixels, by its own transform: `exact`, its very steps, or `fast`, torch's.

`scaled` is `fast` with large JPEGs decoded to fewer pixels. All stop before the transform's last two steps, ToTensor
and Normalize, which `normalizer` does on the model's device: so pixels are uint8, a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
import torch
from torch.nn.functional import interpolate
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms.v2.functional import center_crop_image, resize_image

from clip_batch.errors import EncoderError
from clip_batch.samples.decode import JPEGS, load_image, open_image, read_header

if TYPE_CHECKING:
    from PIL.Image import Image

    from clip_batch.encoders import Pixels

    Prepare = Callable[[bytes | memoryview, int], Pixels]
    Steps = Callable[[Image], Any]

GAP = 2.0
"""To how many times its resized sides, at the least, `scaled` decodes a JPEG; another would be another encoder."""


@dataclass(frozen=True)
class Shape:
    """A transform's resize and crop, as torch does them."""

    size: Sequence[int]
    """What is resized to: the shorter side, or height and width."""
    way: InterpolationMode
    crop: Callable[[torch.Tensor], torch.Tensor]
    """Of uint8 (3, h, w); where it crops a copy, as a view would keep the whole in memory."""


def rgb(image: Image) -> Image:
    """A step: any image to RGB."""
    return image.convert("RGB")


_CONVERSIONS = ("MaybeConvertMode", "_convert_to_rgb", "rgb")
"""open_clip's names, and ours, of the step that makes an image RGB."""

GREY_SIDE = 8
GREY = b"P5 8 8 255\n" + bytes([128]) * GREY_SIDE**2
"""A small picture, by which a model's size of images is found."""


def split(transform: Any) -> tuple[Steps, Normalize | None]:
    """A transform's steps before ToTensor, and its Normalize; the whole and None if it does not end in those two."""
    steps = getattr(transform, "transforms", [])
    if len(steps) > 2 and isinstance(steps[-2], ToTensor) and isinstance(steps[-1], Normalize):
        return Compose(steps[:-2]), steps[-1]
    return transform, None


def normalizer(last: Normalize, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """ToTensor and Normalize, bit for bit, of batches on the device: uint8 (n, 3, h, w) to float32."""
    # 255 as a tensor of the device: by a plain number CUDA would multiply with the reciprocal.
    white = torch.tensor(255.0, device=device)
    mean, std = (torch.as_tensor(values, device=device).view(-1, 1, 1) for values in (last.mean, last.std))

    def normalized(pixels: torch.Tensor) -> torch.Tensor:
        wide = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return wide.div_(white).sub_(mean).div_(std)

    return normalized


def preparing(mode: str, steps: Steps, last: Normalize | None, shape: Shape | None = None) -> Prepare:
    """The way from an image file to pixels: "exact", "fast" or "scaled". EncoderError: a transform for exact alone.

    `shape` is the resize and crop where the steps are not torchvision's.
    """
    if mode == "exact":
        return partial(exact, steps)
    if mode not in (ways := {"fast": fast, "scaled": scaled}):
        raise EncoderError(f"no preprocessing is called {mode!r}: there are exact, {', '.join(ways)}")
    shape = shape or _shape(steps, last)
    if mode == "scaled" and shape.way not in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC):
        raise unknown(steps)
    return partial(ways[mode], steps, shape)


def described(steps: Steps, last: Normalize | None) -> dict[str, Any]:
    """A transform that `fast` knows as plain values, for `composed`; EncoderError if it is any other."""
    shape = _parts(steps, last)
    assert last is not None
    size = shape[0].size
    found = {
        "size": [size] if isinstance(size, int) else list(size),
        "crop": list(shape[1].size) if shape[1] else None,
        "interpolation": shape[0].interpolation.value,
        "rgb_first": getattr(steps.transforms[0], "__name__", "") == "rgb",  # type: ignore[attr-defined]
    }
    return {**found, "mean": [float(one) for one in last.mean], "std": [float(one) for one in last.std]}


def composed(values: dict[str, Any]) -> Compose:
    """The transform that such values describe; colours are made RGB before resizing only with `rgb_first`."""
    size, crop = values["size"], values.get("crop")
    resize = Resize(size[0] if len(size) == 1 else size, InterpolationMode(values.get("interpolation", "bicubic")))
    steps = [resize, *([CenterCrop(crop)] if crop else [])]
    steps = [rgb, *steps] if values.get("rgb_first") else [*steps, rgb]
    return Compose([*steps, ToTensor(), Normalize(values["mean"], values["std"])])


def exact(steps: Steps, data: bytes | memoryview, max_pixels: int) -> Pixels:
    """The steps' result: uint8 (3, h, w), float32 where they end in a tensor. DecodeError."""
    return _array(steps(open_image(data, max_pixels)))


def fast(steps: Steps, shape: Shape, data: bytes | memoryview, max_pixels: int) -> Pixels:
    """uint8 (3, h, w): RGB and grey resized by torch, near Pillow's. DecodeError.

    The whole is resized, then cropped: resizing only what the crop keeps gives other pixels. Palettes
    and transparency go by the steps, since Pillow resizes these in ways of its own.
    """
    return _whole(steps, shape, data, read_header(data, max_pixels))


def scaled(steps: Steps, shape: Shape, data: bytes | memoryview, max_pixels: int, gap: float = GAP) -> Pixels:
    """As `fast`, but JPEGs much larger than what they are resized to are decoded to less, `gap` times that or more."""
    image = read_header(data, max_pixels)
    if _is_plain(image):
        size = resized(shape.size, image.height, image.width)
        n = eighths(image.height, image.width, size, gap)
        pixels = _decoded(data, -(-image.height * n // 8), -(-image.width * n // 8)) if n < 8 else None
        if pixels is not None:
            # Its sides are rounded up, so they do not tell the scale; and the result's are rounded down: hence 1e-7.
            scale = [8 * new / (n * old) + 1e-7 for new, old in zip(size, (image.height, image.width), strict=True)]
            made = interpolate(pixels[None], None, scale, shape.way.value, antialias=True, recompute_scale_factor=False)
            return _array(shape.crop(made[0]))
    return _whole(steps, shape, data, image)


def resized(size: Sequence[int], height: int, width: int) -> list[int]:
    """The height and width that torchvision's Resize makes of an image's."""
    if len(size) == 2:
        return list(size)
    shorter = min(height, width)
    return [size[0] * height // shorter, size[0] * width // shorter]


def eighths(height: int, width: int, size: Sequence[int], gap: float) -> int:
    """The least of 1, 2, 4 and 8 eighths of both sides that is `gap` times `size` or more; 8, the whole, if none is.

    libjpeg-turbo can decode to the others too, but takes longer for five to seven than for the whole (no SIMD).
    """
    return next((n for n in (1, 2, 4) if height * n >= 8 * gap * size[0] and width * n >= 8 * gap * size[1]), 8)


def _whole(steps: Steps, shape: Shape, data: bytes | memoryview, image: Image) -> Pixels:
    """What `fast` makes of an image of which the header was read."""
    pixels = _decoded(data) if _is_plain(image) else None
    if pixels is None:
        image = load_image(image)
        if image.mode not in ("RGB", "L"):
            return _array(steps(image))
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return _array(shape.crop(resize_image(pixels, list(shape.size), shape.way, antialias=True)))


def _is_plain(image: Image) -> bool:
    return image.format in JPEGS and image.mode in ("RGB", "L")


def _array(made: Any) -> Pixels:
    """What a transform's steps end in, as an array (3, h, w): an RGB image, a tensor, or that array."""
    if isinstance(made, np.ndarray):
        return made
    array: Pixels = made.numpy() if isinstance(made, torch.Tensor) else np.array(made).transpose(2, 0, 1)
    return array


def _decoded(data: bytes | memoryview, height: int = 0, width: int = 0) -> torch.Tensor | None:
    """A JPEG's pixels, the same as Pillow's, sooner: uint8 (3, h, w); None where Pillow must say what it is.

    With `height` and `width` the fewest that are so many or more.
    """
    try:
        found = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:  # it is strict: whatever libjpeg only warns of ends here as well
        return None
    return torch.from_numpy(found).permute(2, 0, 1)


def _parts(steps: Steps, last: Normalize | None) -> tuple[Resize, CenterCrop | None]:
    """The resize and the crop that the steps are; EncoderError if they are anything else."""
    parts = list(getattr(steps, "transforms", []))
    kept = [part for part in parts if getattr(part, "__name__", type(part).__name__) not in _CONVERSIONS]
    kinds = [type(part) for part in kept]
    if last is None or kinds not in ([Resize], [Resize, CenterCrop]) or kept[0].max_size:
        raise unknown(parts)
    return kept[0], kept[1] if len(kept) > 1 else None


def _shape(steps: Steps, last: Normalize | None) -> Shape:
    """The steps' resize and crop; EncoderError as `_parts`."""
    resize, centre = _parts(steps, last)

    def crop(pixels: torch.Tensor) -> torch.Tensor:
        if centre and tuple(centre.size) != pixels.shape[1:]:
            pixels = center_crop_image(pixels, list(centre.size)).clone()
        return pixels

    return Shape([resize.size] if isinstance(resize.size, int) else list(resize.size), resize.interpolation, crop)


def unknown(transform: Any) -> EncoderError:
    """The error of a transform that only `exact` can do."""
    return EncoderError(
        f"fast and scaled preprocessing do not know this model's transform {transform}: plan with --preprocess exact"
    )
