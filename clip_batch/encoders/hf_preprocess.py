"""A transformers image processor as `Preprocessing`: steps on Pillow images, then Normalize.

It is the Pillow processor of each kind: models were measured with it, and its result does not depend on torchvision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, Normalize

from clip_batch.encoders.preprocess import Preprocessing, from_steps, normalizer
from clip_batch.encoders.transforms import ResizeCrop, to_rgb, unsupported

if TYPE_CHECKING:
    from clip_batch.encoders.encoder import Pixels

PATCH_GRID = "spatial_shapes"
"""The output of processors that cut each image into a grid of patches of its own (SigLIP 2's NaFlex)."""

_INTERPOLATIONS = {
    Image.Resampling.BILINEAR: InterpolationMode.BILINEAR,
    Image.Resampling.BICUBIC: InterpolationMode.BICUBIC,
}


def load_processor(folder: str) -> Any:
    """The Pillow image processor that a local folder configures."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)


def from_processor(processor: Any, mode: str, upright: bool = False) -> Preprocessing:
    """An image processor in one of `preprocess.MODES`. EncoderError: only `exact` supports this processor.

    With `upright`, EXIF orientation is applied before it. Pixels are uint8 if the processor's rescaling and normalizing
    equal `normalizer` bit for bit over all 256 values, otherwise float32. Patches are one float32 array (n, p + 3):
    each patch, whether it is there, and the grid's height and width.
    """
    normalize = _normalize(processor)
    settings = {"do_rescale": False, "do_normalize": False} if normalize else {}

    def steps(image: Image.Image) -> Any:
        output = processor(to_rgb(image), return_tensors="np", **settings)
        if PATCH_GRID not in output:
            return np.ascontiguousarray(output["pixel_values"][0])
        patches, mask, grid = (output[name][0] for name in ("pixel_values", "pixel_attention_mask", PATCH_GRID))
        sides = np.broadcast_to(grid, (len(patches), 2))
        return np.concatenate([patches, mask[:, None], sides], axis=1, dtype=np.float32)

    shape = _resize_and_crop(processor) if mode != "exact" and normalize else None
    if mode != "exact" and not shape:
        raise unsupported(type(processor).__name__)
    return from_steps(steps, normalize, mode, upright, shape)


def patch_inputs(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The model's inputs, by name, for a batch (b, n, p + 3) of images in patches."""
    return {
        "pixel_values": pixels[..., :-3],
        "pixel_attention_mask": pixels[..., -3].int(),
        PATCH_GRID: pixels[:, 0, -2:].long(),
    }


def _normalize(processor: Any) -> Normalize | None:
    """The processor's rescaling and normalizing, if they equal ToTensor and Normalize in every bit."""
    if getattr(processor, "crop_size", None) is None and not getattr(processor, "size", None):
        return None
    if not (processor.do_rescale and processor.do_normalize):
        return None
    normalize = Normalize(processor.image_mean, processor.image_std)
    every = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), (16, 16, 3))
    plain = {"do_resize": False, "do_center_crop": False, "do_pad": False}
    theirs = processor(Image.fromarray(every), return_tensors="np", **plain)["pixel_values"]
    ours = normalizer(normalize, torch.device("cpu"))(torch.from_numpy(every.transpose(2, 0, 1)[None].copy()))
    return normalize if theirs.shape == ours.shape and np.array_equal(theirs, ours.numpy()) else None


def _resize_and_crop(processor: Any) -> ResizeCrop | None:
    """The processor's resize and crop; None if it does anything else, or resizes in a way that torch does not have."""
    size, crop = (
        {name: value for name, value in dict(getattr(processor, field, None) or {}).items() if value}
        for field in ("size", "crop_size")
    )
    interpolation = _INTERPOLATIONS.get(processor.resample)
    usual = processor.do_resize and not getattr(processor, "do_pad", False) and _has_usual_steps(processor)
    if not usual or interpolation is None or set(size) not in ({"shortest_edge"}, {"height", "width"}):
        return None
    resized = [size[name] for name in ("shortest_edge", "height", "width") if name in size]
    if getattr(processor, "do_center_crop", False):
        height, width = crop["height"], crop["width"]
        fits = min(resized) >= max(height, width)  # a smaller image would be padded
    else:
        height, width, fits = 0, 0, len(resized) == 2  # with the shorter side alone, images would be of any width
    if not fits:
        return None

    def centre(image: Pixels) -> Pixels:
        if (height, width) in ((0, 0), image.shape[1:]):
            return image
        top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
        return image[:, top : top + height, left : left + width]

    return ResizeCrop(resized, interpolation, centre)


def _has_usual_steps(processor: Any) -> bool:
    """Whether the processor's class takes the steps that most classes take."""
    from transformers.image_processing_backends import PilBackend

    return type(processor)._preprocess is PilBackend._preprocess
