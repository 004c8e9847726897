"""Any open_clip model: built-in name with a tag or a checkpoint, `hf-hub:...` or `local-dir:...`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from clip_batch.encoders.text import TextTower
from clip_batch.errors import EncoderError
from clip_batch.store import file_digest
from clip_batch.types import EncoderSpec

if TYPE_CHECKING:
    import torch

    from clip_batch.encoders import Array, Pixels

    Tower = Callable[[torch.Tensor], torch.Tensor]

_PLAIN_PREPROCESSING = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
"""OpenAI's constants, which open_clip takes where a tag says nothing."""


def weights_digest(model: str, pretrained: str) -> str:
    """sha256 over all that decides a vector: weights, configuration, tokenizer, tag's preprocessing.

    Local files are hashed without loading torch; a tag or a hub name is downloaded into the Hugging
    Face cache first, so planning also fetches the weights, once, for every worker.
    """
    if model.startswith("local-dir:"):
        return _folder_digest(model.removeprefix("local-dir:"))
    if pretrained and os.path.isfile(pretrained):
        return _combine([model.replace("/", "-"), file_digest(pretrained)])
    try:
        if model.startswith("hf-hub:"):
            return _hub_digest(model.removeprefix("hf-hub:"))
        return _tag_digest(model.replace("/", "-"), pretrained)
    except EncoderError:
        raise
    except Exception as error:
        raise EncoderError(
            f"weights of {model} {pretrained} cannot be had: {_line(error)}; with no network, "
            "name a checkpoint's path as --pretrained, or --model local-dir:FOLDER"
        ) from None


def _folder_digest(folder: str) -> str:
    if not os.path.isfile(os.path.join(folder, "open_clip_config.json")):
        raise EncoderError(f"no open_clip_config.json in {folder}: name a folder that open_clip saved")
    names = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name)))
    parts = [f"{name} {file_digest(os.path.join(folder, name))}" for name in names if not name.endswith(".md")]
    return _combine(parts)


def _hub_digest(name: str) -> str:
    from huggingface_hub import hf_hub_download
    from open_clip.pretrained import download_pretrained_from_hf

    config = hf_hub_download(name, "open_clip_config.json")
    return _combine([file_digest(config), file_digest(download_pretrained_from_hf(name))])


def _tag_digest(model: str, tag: str) -> str:
    import open_clip

    if model not in open_clip.list_models():
        raise EncoderError(f"open_clip has no model {model!r}; open_clip.list_models() lists the names")
    tags = open_clip.list_pretrained_tags_by_model(model)
    settings = open_clip.get_pretrained_cfg(model, tag) if tag else None
    if not settings:
        what = f"{tag!r} is neither a file nor a tag of {model}" if tag else f"model {model} needs weights"
        raise EncoderError(f"{what}: give --pretrained a checkpoint's path or one of {', '.join(tags) or '(none)'}")
    own = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
        if value and name not in ("url", "hf_hub")
    }
    own = {name: value for name, value in own.items() if _PLAIN_PREPROCESSING.get(name) != value}
    parts = [model, file_digest(open_clip.download_pretrained(settings))]
    return _combine([*parts, json.dumps(own, sort_keys=True)] if own else parts)


def _combine(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def load(spec: EncoderSpec, device: str, compiled: int) -> OpenClipEncoder:
    """Load the model onto a device, compiled for batches of so many images (0: not); EncoderError if it cannot be."""
    from clip_batch.encoders import pick_device

    device = pick_device(device)
    int8 = spec.precision == "int8"
    if int8 and (device != "cpu" or compiled):
        raise EncoderError("precision int8 is for CPUs, and not compiled: give --device cpu, leave out --compile")
    logging.getLogger("open_clip").setLevel(logging.ERROR)
    import open_clip

    precision = "fp32" if int8 else spec.precision
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            spec.model, pretrained=spec.pretrained or None, precision=precision, device=device
        )
        tokenizer = open_clip.get_tokenizer(spec.model)
    except Exception as error:
        raise EncoderError(f"open_clip cannot load {spec.model} {spec.pretrained}: {_line(error)}") from None
    dtype = open_clip.get_input_dtype(precision)
    encoder = OpenClipEncoder(model.eval(), transform, spec.preprocess, tokenizer, device, dtype)
    if compiled:
        encoder.compile(compiled)
    if int8:
        encoder.quantize()
    return encoder


class OpenClipEncoder:
    """An open_clip model with its own tokenizer and transform; EncoderError if that does not go with `preprocess`."""

    def __init__(
        self, model: Any, transform: Any, preprocess: str, tokenizer: Any, device: str, dtype: torch.dtype | None
    ) -> None:
        import torch

        from clip_batch.encoders import pixels

        self._model, self._tokenizer = model, tokenizer
        self._text = TextTower(model)
        self._device = torch.device(device)
        steps, last = pixels.split(transform)
        self._prepare = pixels.preparing(preprocess, steps, last)
        self._normalized = pixels.normalizer(last, self._device) if last else None
        self._dtype = dtype or torch.float32  # of the pixels; open_clip keeps some weights in float32
        self._tower: Tower = model.encode_image
        self._compiled, self._size = self._tower, 0  # the one for batches of so many images
        self.dim = int(self.encode_texts(["a"]).shape[1])

    def compile(self, size: int) -> None:
        """Compile the image tower for batches of `size` images; EncoderError if it cannot be."""
        from clip_batch.encoders.compiled import compiled

        self._compiled, self._size = compiled(self._tower, self._blank(size)), size

    def quantize(self) -> None:
        """Put the image tower in int8; EncoderError if it cannot be."""
        from clip_batch.encoders.int8 import quantized

        self._tower = quantized(self._model, self._blank(1))

    def _blank(self, size: int) -> torch.Tensor:
        """So many images (size, 3, h, w) of the model's size, all zero."""
        import open_clip
        import torch

        side = open_clip.get_model_preprocess_cfg(self._model)["size"]
        height, width = (side, side) if isinstance(side, int) else side
        with torch.inference_mode():  # as all batches are: else they would be of another kind to the compiler
            return torch.zeros(size, 3, height, width, device=self._device, dtype=self._dtype)

    def preprocess(self, data: bytes | memoryview, max_pixels: int) -> Pixels:
        return self._prepare(data, max_pixels)

    def encode_images(self, batch: Pixels) -> Array:
        import numpy as np

        if len(batch) < self._size:  # another shape would be compiled anew
            blank = np.zeros((self._size - len(batch), *batch.shape[1:]), batch.dtype)
            return in_halves(self._encode, np.concatenate([batch, blank]))[: len(batch)]
        return in_halves(self._encode, batch)

    def _encode(self, batch: Pixels) -> Array:
        import torch

        pixels = torch.from_numpy(batch)
        if self._device.type == "cuda":
            pixels = pixels.pin_memory().to(self._device, non_blocking=True)
        with torch.inference_mode():
            if self._normalized:
                pixels = self._normalized(pixels)
            pixels = pixels.to(self._device, self._dtype)
            tower = self._compiled if len(pixels) == self._size else self._tower
            return self._host(tower(pixels))

    def encode_texts(self, texts: Sequence[str]) -> Array:
        import torch

        with torch.inference_mode():
            tokens = self._tokenizer(list(texts)).to(self._device)
            return self._host(self._text(tokens))

    @staticmethod
    def _host(rows: Any) -> Array:
        """Unit norm in float32, whatever the model computes in."""
        import torch

        array: Array = torch.nn.functional.normalize(rows.float(), dim=-1).cpu().numpy()
        return array


def in_halves(encode: Callable[[Pixels], Array], batch: Pixels) -> Array:
    """`encode` of a batch, or of its halves where the GPU's memory cannot hold the whole; raises if not even one."""
    import numpy as np
    import torch

    try:
        return encode(batch)
    except torch.cuda.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()  # out of the except, whose error holds on to the failed pass's memory
    middle = len(batch) // 2
    return np.concatenate([in_halves(encode, half) for half in (batch[:middle], batch[middle:])])
