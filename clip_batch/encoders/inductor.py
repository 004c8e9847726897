"""An image tower compiled by torch's inductor on CUDA, for batches of one size: each is one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from clip_batch.errors import EncoderError, one_line

Tower = Callable[[torch.Tensor], torch.Tensor]


def compiled(encode: Tower, blank: torch.Tensor) -> Tower:
    """`encode`, of pixels like `blank` (n, 3, h, w) to rows (n, d), compiled now for that very shape and device.

    Rows hold until the next call. EncoderError: it cannot be compiled here.
    """
    lane = ThreadPoolExecutor(1, "compiled")  # a CUDA graph belongs to the thread that records it
    faster = torch.compile(encode, dynamic=False, mode="reduce-overhead")

    def run(pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return faster(pixels)

    def tower(pixels: torch.Tensor) -> torch.Tensor:
        return lane.submit(run, pixels).result()

    try:
        tower(blank)
    except Exception as error:  # torch's compiler raises what it likes
        line = one_line(error, 200)
        mend = "install g++ and Python's headers, or leave out --compile"
        raise EncoderError(f"torch cannot compile the image tower here ({line}): {mend}") from None
    return tower
