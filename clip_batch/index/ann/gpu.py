"""GPUs for training and assignment, where faiss is built with them (faiss-gpu, or faiss-gpu-cuvs).

Indices are filled and searched on the CPU: what a GPU saves is the comparison of many vectors with many centroids.
"""

from __future__ import annotations

import os
from typing import Any

from clip_batch.index.ann.libfaiss import load

OFF = "CLIP_BATCH_FAISS_GPU"
"""The variable that, set to 0, keeps faiss off the GPUs."""


def count() -> int:
    """The number of GPUs that faiss may use; 0 where it is built for CPUs."""
    if os.environ.get(OFF) == "0" or not hasattr(load(), "get_num_gpus"):
        return 0
    return int(load().get_num_gpus())


def moved(index: Any) -> Any:
    """The index as a copy on all GPUs; the same index where there is none."""
    return load().index_cpu_to_all_gpus(index) if count() else index
