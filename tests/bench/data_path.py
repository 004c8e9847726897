"""Measures how many images a second get from tars to the encoder's input, beside webdataset.

    python -m tests.bench.data_path [--side 256] [--tars 4] [--samples 1000] [--rounds 5] [--record]
        [--ways fast exact webdataset]

Ours (`fast`, `exact` and `scaled`) is read_slice, a thread for each core, and uint8 batches. The peer is webdataset
with open_clip's own transform and a DataLoader with a worker for each core, which makes float32 batches. Both give
224 x 224 in batches of 64 in this process; rounds are interleaved and the best of each counts. A round of the peer
starts its workers, as each epoch does; `seconds_to_first_batch` says how much of the time that is. `cpu_ms` is CPU
time for each image over all processes: it says more on a machine that others use.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from clip_batch.samples import read_slice
from clip_batch.types import EncoderSpec, Plan, Sample, Shard, Slice
from tests import corpus
from tests.bench import result
from tests.bench.text import captions

BATCH = 64
AHEAD = 4 * BATCH
KINDS = 100
"""Number of different pictures; each is in the tars many times."""

OURS = ("fast", "exact", "scaled")

Batches = Iterator[Any]


def photo(seed: int, side: int) -> bytes:
    """A JPEG (3:2 unless 256 x 256) with the detail of a photograph: noise of all scales, and grain."""
    draw = np.random.default_rng(seed)
    size = (side, side) if side == 256 else (side * 3 // 2, side)
    total = np.zeros((size[1], size[0], 3))
    for scale in (4, 16, 64):
        coarse = Image.fromarray(draw.integers(0, 256, (scale, scale, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), float) / scale**0.5
    total = total / total.max() * 235 + draw.normal(0, 5, total.shape)
    return corpus.encode(Image.fromarray(total.clip(0, 255).astype(np.uint8)), quality=90)


def write_tars(folder: str, tars: int, samples: int, side: int = 256) -> list[str]:
    """Write tars of JPEGs with captions and empty side-cars; returns their paths."""
    photos = [photo(seed, side) for seed in range(min(KINDS, samples))]
    paths = []
    for tar in range(tars):
        files = []
        for number, text in enumerate(captions(random.Random(tar), samples)):
            key = f"{tar:03d}{number:06d}"
            image = photos[number % len(photos)]
            files += [(f"{key}.jpg", image), (f"{key}.txt", text.encode()), (f"{key}.json", b"{}")]
        paths.append(corpus.write_tar(f"{folder}/{tar:05d}.tar", files))
    return paths


def ours(tars: list[str], mode: str, cores: int) -> Batches:
    from open_clip.transform import image_transform

    from clip_batch.encoders import preprocess
    from clip_batch.encoders.device import use_torch_threads

    prepare = preprocess.from_transform(image_transform(224, is_train=False), mode).prepare
    plan = Plan((), EncoderSpec("fake:8", "", ""))

    def taken() -> Iterator[Any]:
        window: deque[Any] = deque()
        for path in tars:
            for sample in read_slice(Slice(Shard(path)), plan):
                assert isinstance(sample, Sample) and sample.image is not None
                window.append(pool.submit(prepare, sample.image, 10**8))
                if len(window) > AHEAD:
                    yield window.popleft().result()
        while window:
            yield window.popleft().result()

    with ThreadPoolExecutor(cores, "decode", use_torch_threads, (1,)) as pool:
        batch: list[Any] = []
        for image in taken():
            batch.append(image)
            if len(batch) == BATCH:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)


def peer(tars: list[str], cores: int) -> Batches:
    import webdataset
    from open_clip.transform import image_transform
    from torch.utils.data import DataLoader

    source = webdataset.WebDataset(tars, shardshuffle=False).decode("pilrgb").to_tuple("jpg")
    batches = source.map_tuple(image_transform(224, is_train=False)).batched(BATCH)
    for (images,) in DataLoader(batches, batch_size=None, num_workers=cores, prefetch_factor=4):
        yield images


def cpu_seconds() -> float:
    """CPU seconds of this process and of those it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--side", type=int, default=256, help="shorter side of the images")
    parser.add_argument("--tars", type=int, default=4)
    parser.add_argument("--samples", type=int, default=1000, help="a tar")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=["fast", "exact", "webdataset"], choices=[*OURS, "webdataset"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    total = options.tars * options.samples
    best: dict[str, float] = {}
    first: dict[str, float] = {}
    cpu: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as home:
        tars = write_tars(home, options.tars, options.samples, options.side)
        size = round(sum(os.path.getsize(path) for path in tars) / total)
        for _ in range(options.rounds):
            for name in options.ways:
                started, used, seen = time.perf_counter(), cpu_seconds(), 0
                for batch in ours(tars, name, cores) if name in OURS else peer(tars, cores):
                    if not seen:
                        first[name] = min(first.get(name, 1e9), time.perf_counter() - started)
                    seen += len(batch)
                    assert tuple(batch.shape[1:]) == (3, 224, 224)
                assert seen == total
                best[name] = min(best.get(name, 1e9), time.perf_counter() - started)
                cpu[name] = min(cpu.get(name, 1e9), cpu_seconds() - used)
    peer_name = options.ways[-1]
    cpu_ms = {name: round(seconds / total * 1000, 2) for name, seconds in cpu.items()}
    rows = [
        result.Row(
            name,
            f"JPEGs of {options.side:,} pixels (shorter side) from tars to 224 x 224, `{name}`, all cores",
            "images/s",
            round(total / best[name], 1),
            None if name == peer_name else round(total / best[peer_name], 1),
            peer_name,
            None if name == peer_name else round(best[peer_name] / best[name], 2),
            4 if (name, peer_name) == ("fast", "webdataset") else None,
            cpu_ms[name],
        )
        for name in options.ways
    ]
    figures = {
        "sample_bytes": size,
        "images_per_second": {name: round(total / seconds, 1) for name, seconds in best.items()},
        f"over_{peer_name}": {name: round(best[peer_name] / best[name], 2) for name in options.ways[:-1]},
        "cpu_ms": cpu_ms,
        "seconds_to_first_batch": {name: round(seconds, 2) for name, seconds in first.items()},
    }
    result.report("data_path", "encoders", options, rows, figures)


if __name__ == "__main__":
    main()
