"""What models share that run in torch: device, pixels, batches of one shape, halves, unit norms on the host.

A family's `load` makes two functions of a model, of pixels and of texts to rows, and a `TorchEncoder` of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clip_batch.encoders import NO_TEXT, preprocess
from clip_batch.encoders.device import pick_device
from clip_batch.errors import EncoderError
from clip_batch.types import EncoderSpec

if TYPE_CHECKING:
    from torchvision.transforms import Normalize

    from clip_batch.encoders import Array, Pixels
    from clip_batch.encoders.preprocess import Prepare

Tower = Callable[[torch.Tensor], torch.Tensor]
"""Pixels (n, 3, h, w), as the model wants them, to rows (n, d)."""

Texts = Callable[[Sequence[str]], torch.Tensor]
"""n texts to rows (n, d)."""

_DTYPES = {"fp32": torch.float32, "int8": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def placed(spec: EncoderSpec, device: str, compiled: int) -> tuple[torch.device, torch.dtype]:
    """Where a model goes and what it computes in. EncoderError: int8 elsewhere than plainly on a CPU."""
    device = pick_device(device)
    if spec.precision == "int8" and (device != "cpu" or compiled):
        raise EncoderError("precision int8 is for CPUs, and not compiled: give --device cpu, leave out --compile")
    if compiled and device == "cpu" and spec.precision != "fp32":
        raise EncoderError(f"--compile on a CPU is for precision fp32, not {spec.precision}: leave it out")
    return torch.device(device), _DTYPES[spec.precision]


class TorchEncoder:
    """An image tower and, where the model has one, a text tower, as an `Encoder`.

    `model` is the module that the image tower belongs to; `last` the normalizing that is left to do of uint8
    pixels that `prepare` gives, None where it gives all done. `compiled` is the size of batches that the image tower
    is compiled for (0: not). EncoderError: it cannot be compiled, or put in int8.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        model: Any,
        image: Tower,
        texts: Texts | None,
        prepare: Prepare,
        last: Normalize | None,
        place: tuple[torch.device, torch.dtype],
        compiled: int = 0,
    ) -> None:
        self.has_text = texts is not None
        self._tower, self._texts, self._prepare = image, texts, prepare
        self._device, self._dtype = place
        self._normalized = preprocess.normalizer(last, self._device) if last else None
        self._compiled, self._size = image, 0  # the one for batches of so many images
        if compiled:
            self._compiled, self._size = _compiled(model, image, self._blank(compiled)), compiled
        if spec.precision == "int8":
            from clip_batch.encoders.onnx_runtime import quantized

            self._tower = self._compiled = quantized(model, image, self._blank(1))
        grey = self._prepare(preprocess.GREY, preprocess.GREY_SIDE**2)[None]
        self.dim = int((self.encode_texts(["a"]) if texts else self.encode_images(grey)).shape[1])

    def _blank(self, size: int) -> torch.Tensor:
        """So many images (size, 3, h, w) of the model's size, all zero."""
        shape = self._prepare(preprocess.GREY, preprocess.GREY_SIDE**2).shape
        with torch.inference_mode():  # as all batches are: else they would be of another kind to the compiler
            return torch.zeros(size, *shape, device=self._device, dtype=self._dtype)

    def preprocess(self, data: bytes | memoryview, max_pixels: int) -> Pixels:
        return self._prepare(data, max_pixels)

    def encode_images(self, batch: Pixels) -> Array:
        if len(batch) < self._size:  # another shape would be compiled anew
            blank = np.zeros((self._size - len(batch), *batch.shape[1:]), batch.dtype)
            return in_halves(self._encode, np.concatenate([batch, blank]))[: len(batch)]
        return in_halves(self._encode, batch)

    def _encode(self, batch: Pixels) -> Array:
        values = torch.from_numpy(batch)
        if self._device.type == "cuda":
            values = values.pin_memory().to(self._device, non_blocking=True)
        with torch.inference_mode():
            if self._normalized:
                values = self._normalized(values)
            values = values.to(self._device, self._dtype)
            tower = self._compiled if len(values) == self._size else self._tower
            return self._host(tower(values))

    def encode_texts(self, texts: Sequence[str]) -> Array:
        tower = self._texts
        if tower is None:
            raise EncoderError(NO_TEXT)

        def encode(some: list[str]) -> Array:
            with torch.inference_mode():
                return self._host(tower(some))

        return in_halves(encode, list(texts))

    @staticmethod
    def _host(rows: torch.Tensor) -> Array:
        """Unit norm in float32, whatever the model computes in."""
        array: Array = torch.nn.functional.normalize(rows.float(), dim=-1).cpu().numpy()
        return array


def _compiled(model: Any, image: Tower, blank: torch.Tensor) -> Tower:
    """By inductor on CUDA, by ONNX Runtime on a CPU, where inductor gains nothing."""
    if blank.device.type == "cuda":
        from clip_batch.encoders.inductor import compiled

        return compiled(image, blank)
    from clip_batch.encoders import onnx_runtime

    return onnx_runtime.compiled(model, image, blank)


def in_halves(encode: Callable[[Any], Array], batch: Pixels | list[str]) -> Array:
    """`encode` of a batch, or of its halves where the GPU's memory cannot hold the whole; raises if not even one."""
    try:
        return encode(batch)
    except torch.cuda.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()  # out of the except, whose error holds on to the failed pass's memory
    middle = len(batch) // 2
    return np.concatenate([in_halves(encode, half) for half in (batch[:middle], batch[middle:])])
