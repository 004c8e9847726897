"""A transformers image processor as `pixels` takes a transform: steps on Pillow's images, Normalize, torch's shape.

It is the Pillow one of each kind: what models were measured with, and the same whichever torchvision there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, Normalize

from clip_batch.encoders import preprocess

if TYPE_CHECKING:
    from clip_batch.encoders.preprocess import Prepare

PATCHES = "spatial_shapes"
"""What a processor also gives that cuts an image into patches in a grid of its own (SigLIP 2's NaFlex)."""

_WAYS = {Image.Resampling.BILINEAR: InterpolationMode.BILINEAR, Image.Resampling.BICUBIC: InterpolationMode.BICUBIC}


def read(folder: str) -> Any:
    """The image processor that a local folder configures, the Pillow one."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)


def preparing(processor: Any, mode: str) -> tuple[Prepare, Normalize | None]:
    """The way from an image file to pixels, and the normalizing left to do. EncoderError: only exact knows it.

    Pixels are uint8 where the normalizing left is the processor's own, bit for bit, over all 256 values; else float32.
    Patches come as one float32 array (n, p + 3): each patch, whether it is there, the grid's height and width.
    """
    last = _normalize(processor)
    settings = {"do_rescale": False, "do_normalize": False} if last else {}

    def steps(image: Image.Image) -> Any:
        made = processor(preprocess.rgb(image), return_tensors="np", **settings)
        if PATCHES not in made:
            return np.ascontiguousarray(made["pixel_values"][0])
        patches, mask, shape = (made[name][0] for name in ("pixel_values", "pixel_attention_mask", PATCHES))
        grid = np.broadcast_to(shape, (len(patches), 2))
        return np.concatenate([patches, mask[:, None], grid], axis=1, dtype=np.float32)

    shape = _shape(processor) if mode != "exact" and last else None
    if mode != "exact" and not shape:
        raise preprocess.unknown(type(processor).__name__)
    return preprocess.preparing(mode, steps, last, shape), last


def grids(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model is given of images (b, n, p + 3) in patches."""
    return {
        "pixel_values": values[..., :-3],
        "pixel_attention_mask": values[..., -3].int(),
        PATCHES: values[:, 0, -2:].long(),
    }


def _normalize(processor: Any) -> Normalize | None:
    """Its rescaling and normalizing, if they are ToTensor's and Normalize's in every bit."""
    if getattr(processor, "crop_size", None) is None and not getattr(processor, "size", None):
        return None
    if not (processor.do_rescale and processor.do_normalize):
        return None
    last = Normalize(processor.image_mean, processor.image_std)
    every = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), (16, 16, 3))
    plain = {"do_resize": False, "do_center_crop": False, "do_pad": False}
    theirs = processor(Image.fromarray(every), return_tensors="np", **plain)["pixel_values"]
    ours = preprocess.normalizer(last, torch.device("cpu"))(torch.from_numpy(every.transpose(2, 0, 1)[None].copy()))
    return last if theirs.shape == ours.shape and np.array_equal(theirs, ours.numpy()) else None


def _shape(processor: Any) -> preprocess.Shape | None:
    """Its resizing and cropping by torch; None where it does something else besides, or in a way torch has not."""
    size, crop = (
        {name: value for name, value in dict(getattr(processor, field, None) or {}).items() if value}
        for field in ("size", "crop_size")
    )
    way = _WAYS.get(processor.resample)
    usual = processor.do_resize and not getattr(processor, "do_pad", False) and _is_usual(processor)
    if not usual or way is None or set(size) not in ({"shortest_edge"}, {"height", "width"}):
        return None
    resized = [size[name] for name in ("shortest_edge", "height", "width") if name in size]
    if getattr(processor, "do_center_crop", False):
        height, width = crop["height"], crop["width"]
        fits = min(resized) >= max(height, width)  # else it would be padded
    else:
        height, width, fits = 0, 0, len(resized) == 2  # else images would be of any width
    if not fits:
        return None

    def centred(image: torch.Tensor) -> torch.Tensor:
        if (height, width) in ((0, 0), image.shape[1:]):
            return image
        top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
        return image[:, top : top + height, left : left + width].clone()

    return preprocess.Shape(resized, way, centred)


def _is_usual(processor: Any) -> bool:
    """Whether it takes the steps that most take."""
    from transformers.image_processing_backends import PilBackend

    return type(processor)._preprocess is PilBackend._preprocess
