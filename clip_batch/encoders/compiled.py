"""An image tower compiled by torch's inductor, for batches of one size.

On a CPU the weights become constants of the code; on CUDA a batch is one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch._inductor.config

from clip_batch.encoders import threads, use_threads
from clip_batch.errors import EncoderError

Tower = Callable[[torch.Tensor], torch.Tensor]


def compiled(encode: Tower, blank: torch.Tensor) -> Tower:
    """`encode`, of pixels like `blank` (n, 3, h, w) to rows (n, d), compiled now for that very shape and device.

    Rows on CUDA hold until the next call. EncoderError: it cannot be compiled here.
    """
    cpu = blank.device.type == "cpu"
    # A CUDA graph belongs to the thread that records it, as code for a CPU does to its number of threads.
    lane = ThreadPoolExecutor(1, "compiled", use_threads, (threads(),))
    faster = torch.compile(encode, dynamic=False, mode=None if cpu else "reduce-overhead")

    def run(pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), torch._inductor.config.patch(freezing=cpu):
            return faster(pixels)

    def tower(pixels: torch.Tensor) -> torch.Tensor:
        return lane.submit(run, pixels).result()

    try:
        tower(blank)
    except Exception as error:  # torch's compiler raises what it likes
        line = " ".join(str(error).split())[:200]
        mend = "install g++ and Python's headers, or leave out --compile"
        raise EncoderError(f"torch cannot compile the image tower here ({line}): {mend}") from None
    return tower
