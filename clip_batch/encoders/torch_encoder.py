"""`TorchEncoder` makes an `Encoder` of any model that runs in torch.

A family's `load` tells it how pixels become rows, and how texts do. TorchEncoder does the rest: the device, its
streams, the precision, compilation, batches that are too large for a GPU, unit norm.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from clip_batch.encoders import inductor
from clip_batch.encoders.device import LANES, host_batch, pick_device
from clip_batch.encoders.encoder import NO_TEXT
from clip_batch.encoders.preprocess import GREY, GREY_SIDE, Preprocessing, normalizer
from clip_batch.encoders.replay import Replay
from clip_batch.errors import EncoderError
from clip_batch.types import EncoderSpec

if TYPE_CHECKING:
    from clip_batch.encoders.encoder import Array, Pixels

ImageTower = Callable[[torch.Tensor], torch.Tensor]
"""From normalized pixels (n, 3, h, w) to rows (n, d)."""

_DTYPES = {"fp32": torch.float32, "int8": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


_LAUNCHING = threading.Lock()
"""Torch may compile at any call, and no other thread may run what is compiled then. A launch takes milliseconds."""


class TextSide(NamedTuple):
    """How n texts become rows (n, d)."""

    tokenize: Callable[[Sequence[str]], Any]
    """What the tower takes, on the host, where other threads may compute meanwhile."""
    tower: Callable[[Any], torch.Tensor]


class Placement(NamedTuple):
    """Where and how a model runs."""

    device: torch.device
    dtype: torch.dtype
    """What the model computes in, unless the image side is in int8."""
    int8: bool = False
    compiled: int = 0
    """The size of the batches that the image side is compiled for, on CUDA of any size; 0: it is not compiled."""


def place(spec: EncoderSpec, device: str, compiled: int) -> Placement:
    """The placement that a family's `load` is asked for. EncoderError: the device cannot do the spec's precision.

    With precision fp32 on a GPU, TF32 is off in this process from here on, for convolutions and matrix products.
    """
    device = pick_device(device)
    if spec.precision == "int8" and (device != "cpu" or compiled):
        raise EncoderError("precision int8 is for CPUs, and not compiled: give --device cpu, leave out --compile")
    if compiled and device == "cpu" and spec.precision != "fp32":
        raise EncoderError(f"--compile on a CPU is for precision fp32, not {spec.precision}: leave it out")
    _check_device(device)
    if spec.precision == "fp32" and device != "cpu":
        _refuse_tf32()
    return Placement(torch.device(device), _DTYPES[spec.precision], spec.precision == "int8", compiled)


def _refuse_tf32() -> None:
    """Have products of float32 numbers computed from all of their bits: cuDNN takes 10 of 23 unless told not to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some releases from torch 2.9 on prefer settings that 2.8 has not
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False  # set where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is


def _check_device(device: str) -> None:
    """EncoderError: torch cannot use this GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name, _, number = device.partition(":")
    if name == "cuda" and int(number or 0) >= count:
        seen = f"only {count} of them" if count else "none"
        raise EncoderError(f"--device {device}: torch needs a GPU of that name and sees {seen} here: give --device cpu")


class TorchEncoder:
    """An `Encoder` of an image tower and, if the model has one, a text tower.

    `model` is the module that the image tower uses, already on the placement's device and in its dtype.
    EncoderError: the image tower cannot be compiled, or cannot run in int8.
    """

    def __init__(
        self,
        model: Any,
        image_tower: ImageTower,
        text_side: TextSide | None,
        preprocessing: Preprocessing,
        placement: Placement,
    ) -> None:
        self.has_text = text_side is not None
        self._image_tower, self._text_side = image_tower, text_side
        self._preprocess, normalize = preprocessing
        self._device, self._dtype = placement.device, placement.dtype
        self._normalize = normalizer(normalize, self._device) if normalize else lambda pixels: pixels
        self._compiled, self._padded, self._least = image_tower, 0, 1
        self._replay, self._recorded = Replay(self._image_rows, self._device), 0
        if placement.compiled and self._device.type == "cuda":
            self._image_tower = inductor.compile_tower(model, image_tower, self._blank(2))
            self._normalize = torch.compile(self._normalize, dynamic=True)
            self._least = 2  # a batch of one would be compiled anew
            self._recorded = placement.compiled
        elif placement.compiled:  # inductor gains nothing on a CPU
            from clip_batch.encoders import onnx_runtime

            self._padded = placement.compiled
            self._compiled = onnx_runtime.compile_tower(model, image_tower, self._blank(placement.compiled))
        if placement.int8:
            from clip_batch.encoders.onnx_runtime import quantize

            self._image_tower = quantize(model, image_tower, self._blank(1))
        self._launching = _LAUNCHING if self._device.type == "cuda" else contextlib.nullcontext()
        self._streams: SimpleQueue[torch.cuda.Stream] = SimpleQueue()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the weights, which other streams will read, are there
            for _ in range(LANES):
                self._streams.put(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]
        self._fit_images, self._fit_texts = Fitting(self._encode_images), Fitting(self._encode_texts)
        if text_side is None or self._least > 1:  # compiled code is made here, and not when a batch waits for it
            self.dim = int(self.encode_images(np.stack([self._grey()])).shape[1])
        if self._recorded:
            batch = host_batch(self._grey(), self._recorded, "cpu")
            batch[:] = self._grey()
            for _ in range(LANES):
                self.encode_images(batch)
        if text_side:
            self.dim = int(self.encode_texts(["a"]).shape[1])

    def preprocess(self, data: bytes | memoryview, max_pixels: int) -> Pixels:
        return self._preprocess(data, max_pixels)

    def encode_images(self, batch: Pixels) -> Array:
        if len(batch) < self._padded:  # padded, because a batch of another size would run uncompiled
            padding = np.zeros((self._padded - len(batch), *batch.shape[1:]), batch.dtype)
            return self._fit_images(np.concatenate([batch, padding]))[: len(batch)]
        if 0 < len(batch) < self._least:
            return self._fit_images(np.concatenate([batch, batch]))[: len(batch)]
        return self._fit_images(batch)

    def encode_texts(self, texts: Sequence[str]) -> Array:
        # Tokenizers cannot take lone surrogates, which a program's own texts may hold.
        texts = [text if text.isascii() else text.encode(errors="replace").decode() for text in texts]
        if 0 < len(texts) < self._least:
            return self._fit_texts([*texts, *texts])[: len(texts)]
        return self._fit_texts(texts)

    def _encode_images(self, batch: Pixels) -> Array:
        with self._lane(), torch.inference_mode():
            pixels = torch.from_numpy(batch)
            with self._launching:
                if 0 < len(batch) == self._recorded:
                    rows = self._replay(pixels)
                else:
                    rows = self._image_rows(pixels.to(self._device, non_blocking=True))
            return _on_host(rows)

    def _image_rows(self, pixels: torch.Tensor) -> torch.Tensor:
        tower = self._compiled if len(pixels) == self._padded else self._image_tower
        return _unit_rows(tower(self._normalize(pixels).to(self._dtype)))

    def _encode_texts(self, texts: list[str]) -> Array:
        if self._text_side is None:
            raise EncoderError(NO_TEXT)
        tokens = self._text_side.tokenize(texts)
        with self._lane(), torch.inference_mode():
            with self._launching:
                rows = _unit_rows(self._text_side.tower(tokens))
            return _on_host(rows)

    @contextlib.contextmanager
    def _lane(self) -> Iterator[None]:
        """On a GPU, what this thread does runs on one of the streams; it waits until one is free."""
        if self._device.type != "cuda":
            yield
            return
        stream = self._streams.get()
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            self._streams.put(stream)

    def _grey(self) -> Pixels:
        """The pixels of a small grey picture, by which the shape of the model's images is known."""
        return self._preprocess(GREY, GREY_SIDE**2)

    def _blank(self, size: int) -> torch.Tensor:
        """A batch of `size` images, all zero."""
        with torch.inference_mode():  # as for all batches: the compiler distinguishes other tensors
            return torch.zeros(size, *self._grey().shape, device=self._device, dtype=self._dtype)


class Fitting:
    """Encodes batches in pieces that the GPU's memory can hold; a size that it could not hold is not tried again.

    torch.cuda.OutOfMemoryError: the memory cannot hold a single item.
    """

    def __init__(self, encode: Callable[[Any], Array]) -> None:
        self._encode = encode
        self._most: int | None = None

    def __call__(self, batch: Pixels | list[str]) -> Array:
        if self._most is None or len(batch) <= self._most:
            try:
                return self._encode(batch)
            except torch.cuda.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            torch.cuda.empty_cache()  # outside `except`, whose error keeps the memory of the failed pass alive
            self._most = len(batch) // 2
        size = self._most
        return np.concatenate([self(batch[at : at + size]) for at in range(0, len(batch), size)])


def _unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows of unit norm, float32, whatever the model computes in. EncoderError: they are not (n, d)."""
    if rows.ndim != 2:
        raise EncoderError(
            f"the model answers with {' x '.join(map(str, rows.shape))} numbers, not with one vector for each input: "
            "take another model, see docs/models.md"
        )
    return torch.nn.functional.normalize(rows.float(), dim=-1)


def _on_host(rows: torch.Tensor) -> Array:
    """The rows once the device has computed them."""
    array: Array = rows.cpu().numpy()
    return array
