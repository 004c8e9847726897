"""What this process may use of the machine: CPU cores, GPUs, and torch's threads."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt


LANES = 2
"""Batches that are on a GPU at the same time, each on a stream of its own: one is copied while another is computed."""


def cores() -> int:
    """CPU cores that this process may use: its CPU affinity, and no more than its SLURM task was allocated."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, int(os.environ.get("SLURM_CPUS_PER_TASK", allowed)))


def gpus() -> int:
    """CUDA devices that torch sees; 0 without torch."""
    try:
        import torch
    except ImportError:
        return 0
    return int(torch.cuda.device_count())


def loaded_gpus() -> int:
    """CUDA devices that torch sees; 0 where it is not loaded, which takes seconds."""
    return gpus() if "torch" in sys.modules else 0


def pick_device(device: str) -> str:
    """Resolve `auto`: "cuda" where torch can use a GPU, else "cpu"; any other device is returned as it is.

    Where the SLURM tasks of a node all see all of its GPUs, each task gets a GPU of its own, "cuda:N".
    """
    if device != "auto":
        return device
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if "SLURM_LOCALID" in os.environ and (visible := gpus()) > 1:
        return f"cuda:{int(os.environ['SLURM_LOCALID']) % visible}"
    return "cuda"


def host_array(shape: tuple[int, ...], dtype: npt.DTypeLike, device: str) -> npt.NDArray[Any]:
    """An array with undefined values, which a GPU copies without the help of the CPU if `device` is one (pinned)."""
    import numpy as np

    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_available():
            kind = torch.from_numpy(np.empty(0, dtype)).dtype
            return torch.empty(shape, dtype=kind, pin_memory=True).numpy()
    return np.empty(shape, dtype)


def host_batch(pixels: npt.NDArray[Any], size: int, device: str) -> npt.NDArray[Any]:
    """A `host_array` for `size` images like `pixels`, axes in memory in the same order: each is copied as one block."""
    order = sorted(range(pixels.ndim), key=lambda axis: -pixels.strides[axis])
    rows = host_array((size, *(pixels.shape[axis] for axis in order)), pixels.dtype, device)
    return rows.transpose(0, *(1 + order.index(axis) for axis in range(pixels.ndim)))


def torch_threads() -> int:
    """Threads that one torch operation of the calling thread may use; 1 if torch is not loaded."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else 1


def use_torch_threads(count: int) -> None:
    """Let torch operations of the calling thread use `count` threads.

    Threads that first use torch later start with the count that was set last, by whichever thread.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)
