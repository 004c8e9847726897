"""Passes of a model that a GPU repeats by itself: recorded once as a CUDA graph, and started by one call from then on.

A pass is hundreds of launches, and each gives up Python's lock and waits for it again behind the decoding threads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from clip_batch.errors import one_line

Pass = Callable[[torch.Tensor], torch.Tensor]
"""From a batch on the device to its rows there."""


class Replay:
    """A pass of which each shape is recorded when it first comes, once for each stream, and replayed after that.

    A pass that cannot be recorded is run as it is, with a warning. Call it only for shapes that come often: each has
    memory of its own on the device.
    """

    def __init__(self, run: Pass, device: torch.device) -> None:
        self._run, self._device = run, device
        self._pools: dict[int, Any] = {}
        self._recordings: dict[tuple[int, torch.Size], _Recording | None] = {}

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """The rows of a batch on the host, which is copied while other streams compute if its memory is pinned."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        key = stream, batch.shape
        if key not in self._recordings:
            # What was recorded for one stream never runs twice at once, so that it can share memory.
            if stream not in self._pools:
                self._pools[stream] = torch.cuda.graph_pool_handle()
            self._recordings[key] = _record(self._run, batch, self._device, self._pools[stream])
        recording = self._recordings[key]
        if recording is None:
            return self._run(batch.to(self._device, non_blocking=True))
        recording.batch.copy_(batch, non_blocking=True)
        recording.graph.replay()
        return recording.rows.clone()  # the next replay overwrites them


class _Recording(NamedTuple):
    """A recorded pass, and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: torch.Tensor
    rows: torch.Tensor


def _record(run: Pass, batch: torch.Tensor, device: torch.device, pool: Any) -> _Recording | None:
    """Record a pass on the current stream, with axes in memory as the batch has them; None if that is impossible."""
    given = torch.empty_like(batch, device=device).copy_(batch)
    for _ in range(2):  # what is compiled, chosen or allocated at a first call comes before
        run(given)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            rows = run(given)
        finally:
            graph.capture_end()
    except Exception as error:  # the device's driver raises errors of any class
        warnings.warn(f"batches are launched piece by piece, and slower: {one_line(error, 200)}", stacklevel=2)
        return None
    return _Recording(graph, given, rows)
