"""Encoded images to a model's pixels, by its own transform: `exact`, its very steps, or `fast`, torch's.

Both stop before the transform's last two steps, ToTensor and Normalize, which `normalizer` does on
the model's device: so pixels are uint8, a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
import torch
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor
from torchvision.transforms.v2.functional import center_crop_image, resize_image

from clip_batch.decode import load_image, open_image, read_header
from clip_batch.errors import EncoderError

if TYPE_CHECKING:
    from PIL.Image import Image

    from clip_batch.encoders import Pixels

    Prepare = Callable[[bytes | memoryview, int], Pixels]
    Steps = Callable[[Image], Any]

_CONVERSIONS = ("MaybeConvertMode", "_convert_to_rgb")
"""open_clip's names of the step that makes an image RGB."""


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
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (last.mean, last.std))

    def normalized(pixels: torch.Tensor) -> torch.Tensor:
        wide = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return wide.div_(white).sub_(mean).div_(std)

    return normalized


def preparing(mode: str, steps: Steps, last: Normalize | None) -> Prepare:
    """The way from an image file to pixels: "exact" or "fast". EncoderError: the transform is none that fast knows."""
    return partial(exact, steps) if mode == "exact" else partial(fast, steps, *_resizing(steps, last))


def exact(steps: Steps, data: bytes | memoryview, max_pixels: int) -> Pixels:
    """The steps' result: uint8 (3, h, w), float32 where they end in a tensor. DecodeError."""
    return _array(steps(open_image(data, max_pixels)))


def fast(steps: Steps, resize: Resize, crop: CenterCrop | None, data: bytes | memoryview, max_pixels: int) -> Pixels:
    """uint8 (3, h, w): RGB and grey resized by torch, near Pillow's. DecodeError.

    The whole is resized, then cropped: resizing only what the crop keeps gives other pixels. Palettes
    and transparency go by the steps, since Pillow resizes these in ways of its own.
    """
    image = read_header(data, max_pixels)
    plain = image.format == "JPEG" and image.mode in ("RGB", "L")
    pixels = _decoded(data) if plain else None
    if pixels is None:
        image = load_image(image)
        if image.mode not in ("RGB", "L"):
            return _array(steps(image))
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    size = [resize.size] if isinstance(resize.size, int) else list(resize.size)
    pixels = resize_image(pixels, size, resize.interpolation, resize.max_size, antialias=True)
    if crop and tuple(crop.size) != pixels.shape[1:]:  # a copy, as the crop would else keep the whole in memory
        pixels = center_crop_image(pixels, list(crop.size)).clone()
    return _array(pixels)


def _array(made: Any) -> Pixels:
    """What a transform's steps end in, as an array (3, h, w): an RGB image, or a tensor."""
    array: Pixels = made.numpy() if isinstance(made, torch.Tensor) else np.array(made).transpose(2, 0, 1)
    return array


def _decoded(data: bytes | memoryview) -> torch.Tensor | None:
    """A JPEG's pixels, the same as Pillow's, sooner: uint8 (3, h, w); None where Pillow must say what it is."""
    try:
        return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
    except ValueError:  # it is strict: whatever libjpeg only warns of ends here as well
        return None


def _resizing(steps: Steps, last: Normalize | None) -> tuple[Resize, CenterCrop | None]:
    """The resize and the crop that the steps are; EncoderError if they are anything else."""
    parts = list(getattr(steps, "transforms", []))
    kept = [part for part in parts if getattr(part, "__name__", type(part).__name__) not in _CONVERSIONS]
    kinds = [type(part) for part in kept]
    if last is None or kinds not in ([Resize], [Resize, CenterCrop]):
        raise EncoderError(
            f"fast preprocessing does not know this model's transform {parts}: plan with --preprocess exact"
        )
    return kept[0], kept[1] if len(kept) > 1 else None
