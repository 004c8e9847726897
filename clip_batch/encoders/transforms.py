"""Reads torchvision transforms: their steps on Pillow images, their resize and crop, their description in JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms.v2.functional import center_crop_image

from clip_batch.encoders.encoder import NeedsExact

if TYPE_CHECKING:
    from PIL.Image import Image

    from clip_batch.encoders.encoder import Pixels

    Steps = Callable[[Image], Any]
    """The part of a transform that works on Pillow images."""


@dataclass(frozen=True)
class ResizeCrop:
    """The resize and the crop of a transform, as torch does them."""

    size: Sequence[int]
    """The size after the resize: the shorter side, or height and width."""
    interpolation: InterpolationMode
    crop: Callable[[Pixels], Pixels]
    """From uint8 (3, h, w) to uint8 (3, height, width), a view: a slab copies it."""


def to_rgb(image: Image) -> Image:
    """The step that converts an image of any mode to RGB."""
    return image.convert("RGB")


_RGB_STEPS = ("MaybeConvertMode", "_convert_to_rgb", "to_rgb")
"""Names of the steps that convert an image to RGB: open_clip's and ours."""


def split(transform: Any) -> tuple[Steps, Normalize | None]:
    """A transform's steps before ToTensor, and its Normalize; the whole and None if it does not end in those two."""
    steps = getattr(transform, "transforms", [])
    if len(steps) > 2 and isinstance(steps[-2], ToTensor) and isinstance(steps[-1], Normalize):
        return Compose(steps[:-2]), steps[-1]
    return transform, None


def resize_and_crop(steps: Steps, normalize: Normalize | None) -> ResizeCrop:
    """What torch has to do in place of these steps. NeedsExact: they do anything else than resize and crop."""
    resize, centre = _parts(steps, normalize)

    def crop(pixels: Pixels) -> Pixels:
        if centre is None or tuple(centre.size) == pixels.shape[1:]:
            return pixels
        (height, width), old = centre.size, pixels.shape
        if height > old[1] or width > old[2]:  # it is padded
            padded: Pixels = center_crop_image(torch.from_numpy(pixels), [height, width]).numpy()
            return padded
        top, left = round((old[1] - height) / 2), round((old[2] - width) / 2)
        return pixels[:, top : top + height, left : left + width]

    return ResizeCrop([resize.size] if isinstance(resize.size, int) else list(resize.size), resize.interpolation, crop)


def describe(transform: Any) -> dict[str, Any]:
    """A transform as plain values, from which `build` makes it again. NeedsExact: it does more than resize and crop.

    >>> from torchvision.transforms import Compose, Normalize, Resize, ToTensor
    >>> describe(Compose([Resize([8, 8]), to_rgb, ToTensor(), Normalize([0.5] * 3, [0.25] * 3)]))
    {'size': [8, 8], 'crop': None, 'interpolation': 'bilinear', 'rgb_first': False, 'mean': [0.5, 0.5, 0.5], \
'std': [0.25, 0.25, 0.25]}
    """
    steps, normalize = split(transform)
    resize, crop = _parts(steps, normalize)
    assert normalize is not None
    return {
        "size": [resize.size] if isinstance(resize.size, int) else list(resize.size),
        "crop": list(crop.size) if crop else None,
        "interpolation": resize.interpolation.value,
        "rgb_first": _name(steps.transforms[0]) == "to_rgb",  # type: ignore[attr-defined]
        "mean": [float(value) for value in normalize.mean],
        "std": [float(value) for value in normalize.std],
    }


def build(values: dict[str, Any]) -> Compose:
    """The transform that `describe` gives as `values`. It resizes RGB images only with `rgb_first`."""
    size, crop = values["size"], values.get("crop")
    resize = Resize(size[0] if len(size) == 1 else size, InterpolationMode(values.get("interpolation", "bicubic")))
    steps = [resize, *([CenterCrop(crop)] if crop else [])]
    steps = [to_rgb, *steps] if values.get("rgb_first") else [*steps, to_rgb]
    return Compose([*steps, ToTensor(), Normalize(values["mean"], values["std"])])


def unsupported(transform: Any) -> NeedsExact:
    """The error about a transform that only `exact` preprocessing supports."""
    return NeedsExact(
        f"fast and scaled preprocessing do not know this model's transform {transform}: plan with --preprocess exact"
    )


def _parts(steps: Steps, normalize: Normalize | None) -> tuple[Resize, CenterCrop | None]:
    """The resize and the crop among the steps. NeedsExact: there are other steps, or a limit to the longer side."""
    every = list(getattr(steps, "transforms", []))
    parts = [step for step in every if _name(step) not in _RGB_STEPS]
    if normalize is None or [type(part) for part in parts] not in ([Resize], [Resize, CenterCrop]) or parts[0].max_size:
        raise unsupported(every)
    return parts[0], parts[1] if len(parts) > 1 else None


def _name(step: Any) -> str:
    """The name of a step that is a function, or of its class."""
    return str(getattr(step, "__name__", type(step).__name__))
