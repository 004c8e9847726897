"""Encoders of random weights, which the parts share as checkpoints in their folder, and their rates."""

from __future__ import annotations

import gc
import os
import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clip_batch import encoders
from clip_batch.encoders.device import host_batch
from clip_batch.types import EncoderSpec
from tests.bench.data_path import photo
from tests.bench.gpu_parts import Options
from tests.bench.gpu_parts.timing import rate
from tests.bench.text import captions

LIMIT = 10**9


def resolved(model: str, options: Options) -> EncoderSpec:
    """The identity of a model whose random weights, in half precision, are a checkpoint in the parts' folder."""
    checkpoint = "" if model == "demo" else f"{options.home}/{model}.pt"
    if checkpoint and not os.path.exists(checkpoint):
        weights = {name: value.half().cpu() for name, value in created(model, options.device).state_dict().items()}
        torch.save(weights, f"{checkpoint}.new")
        os.replace(f"{checkpoint}.new", checkpoint)
    return encoders.resolve(model, checkpoint, "fast", options.precision)


def created(model: str, device: str, precision: str = "fp32") -> Any:
    """An open_clip model of random weights, drawn on the device, which is much faster than on the host."""
    import open_clip

    torch.manual_seed(0)
    with torch.device(device):
        return open_clip.create_model(model, precision=precision, device=device).eval()


def image_gflop(model: str) -> float | None:
    """Operations of one image (a product and its sum are 2) in 10^9, by torch's counter; None for the demo's model."""
    from torch.utils.flop_counter import FlopCounterMode

    if model == "demo":
        return None
    tower = created(model, "meta").visual
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know the fused attention
    try:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            tower(torch.empty(1, 3, *tower.image_size, device="meta"))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() / 1e9


def loaded(spec: EncoderSpec, options: Options, compiled: int) -> tuple[Any, float]:
    """The encoder, and the seconds that it took to load and compile it; the memory of earlier ones is freed before."""
    gc.collect()
    if options.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(options.device)
    started = time.perf_counter()
    encoder = encoders.load(spec, options.device, compiled=compiled, check=False)
    return encoder, time.perf_counter() - started


@dataclass(frozen=True)
class Work:
    """Batches of random pixels with captions for an encoder; calls take turns with different batches."""

    encoder: Any
    batches: list[Any]
    lines: list[str]
    precision: str

    @classmethod
    def of(cls, encoder: Any, size: int, precision: str, device: str) -> Work:
        """Three batches of `size` images each, in memory such as `embed` gives an encoder."""
        one = encoder.preprocess(photo(0, 256), LIMIT)
        draw = np.random.default_rng(0)
        batches = [host_batch(one, size, device) for _ in range(3)]
        for batch in batches:
            batch[:] = draw.integers(0, 256, batch.shape, dtype=np.uint8)
        return cls(encoder, batches, captions(random.Random(0), size), precision)

    def images(self, seconds: float, threads: int = 1) -> float:
        """Images a second of `encode_images`, by so many threads that call it."""
        return rate(lambda: len(self.encoder.encode_images(self._next())), seconds, threads)

    def texts(self, seconds: float, threads: int = 1) -> float:
        """Captions a second of `encode_texts`."""
        return rate(lambda: len(self.encoder.encode_texts(self.lines)), seconds, threads)

    def pairs(self, seconds: float, threads: int = 1) -> float:
        """Pairs a second of `encode_pairs`, as `embed` calls it."""

        def work() -> int:
            return len(encoders.encode_pairs(self.encoder, self._next(), self.lines, self.precision)[0])

        return rate(work, seconds, threads)

    def _next(self) -> Any:
        return self.batches[random.randrange(len(self.batches))]
