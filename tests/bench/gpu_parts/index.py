"""Training and assignment of an index on the GPU, where faiss is built for GPUs."""

from __future__ import annotations

import time

import faiss
import numpy as np

from clip_batch.index.ann import gpu
from tests.bench.gpu_parts import Part


def run(part: Part) -> None:
    if not gpu.count():
        part.note("faiss sees no GPU here (it is not built for GPUs, or there is none)")
        return
    rows = np.random.default_rng(0).standard_normal((200_000, 768), dtype=np.float32)
    faiss.normalize_L2(rows)
    taken = []
    for on_gpu in (True, False):
        started = time.perf_counter()
        faiss.Kmeans(768, 1024, niter=3, spherical=True, gpu=on_gpu, max_points_per_centroid=200).train(rows)
        taken.append(time.perf_counter() - started)
    part.row("kmeans", "k-means of 200,000 vectors, 1,024 lists, 3 rounds", "s", taken[0], taken[1], "the cores")
