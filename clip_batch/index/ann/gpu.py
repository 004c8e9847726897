"""GPUs for training and assignment, where faiss is built with them (faiss-gpu, or faiss-gpu-cuvs).

Indices are filled and searched on the CPU: what a GPU saves is the comparison of many vectors with many centroids.
CUDA_VISIBLE_DEVICES says which GPUs there are, none if it is empty.
"""

from __future__ import annotations

from clip_batch.index.ann.libfaiss import Index, load


def count() -> int:
    """The number of GPUs that faiss may use; 0 where it is built for CPUs."""
    return int(load().get_num_gpus())


def moved(index: Index) -> Index:
    """The index as a copy on all GPUs; the same index where there is none."""
    return load().index_cpu_to_all_gpus(index) if count() else index
