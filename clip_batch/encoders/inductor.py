"""Compiles an image tower with torch's inductor on CUDA, for batches of one size: each batch runs as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from clip_batch.errors import EncoderError, one_line

Tower = Callable[[torch.Tensor], torch.Tensor]


def compile_tower(tower: Tower, blank: torch.Tensor) -> Tower:
    """A tower from pixels (n, 3, h, w) to rows (n, d), compiled at once for the shape and device of `blank`.

    Its rows are valid until the next call. EncoderError: it cannot be compiled here.
    """
    thread = ThreadPoolExecutor(1, "compiled")  # a CUDA graph belongs to the thread that records it
    faster = torch.compile(tower, dynamic=False, mode="reduce-overhead")

    def run(pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return faster(pixels)

    def compiled(pixels: torch.Tensor) -> torch.Tensor:
        return thread.submit(run, pixels).result()

    try:
        compiled(blank)
    except Exception as error:  # torch's compiler raises errors of any class
        remedy = "install g++ and Python's headers, or leave out --compile"
        raise EncoderError(f"torch cannot compile the image tower here ({one_line(error, 200)}): {remedy}") from None
    return compiled
