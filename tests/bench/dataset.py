"""Measures samples a second of FilteredDataset from local tars, beside its limits, in one run.

    python -m tests.bench.dataset [--side 256] [--tars 4] [--samples 1000] [--rounds 3] [--record]

The limits are `read_slice`, which reads the same tars from one end to the other on one thread, and decoding alone, of
images in memory, by a thread for each core. Rounds are interleaved and the best of each counts. Ours are shuffled; with
0 workers in this process, with 2 in the DataLoader's (a round starts them, as each epoch does, and
`seconds_to_first_batch` is how long that takes). `cpu_ms` is CPU time for each sample over all processes. A "tensor" is
uint8 224 x 224.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from clip_batch import FilteredDataset
from clip_batch.config import MergeConfig
from clip_batch.encoders.device import use_torch_threads
from clip_batch.export.dataset.pictures import pictures
from clip_batch.samples import read_slice
from clip_batch.types import EncoderSpec, Plan, Shard, Slice
from tests.bench import result
from tests.bench.data_path import cpu_seconds, write_tars
from tests.servers.serving import index_of

BATCH = 64


def scanned(tars: list[str]) -> Iterator[int]:
    plan = Plan((), EncoderSpec("fake:8", "", ""))
    for path in tars:
        for sample in read_slice(Slice(Shard(path)), plan):
            assert len(bytes(sample.image))  # type: ignore[arg-type, union-attr]
            yield 1


def decoded(images: list[bytes], cores: int) -> Iterator[int]:
    make = pictures("tensor", 224, 10**8)
    with ThreadPoolExecutor(cores, "decode", use_torch_threads, (1,)) as pool:
        for _ in pool.map(lambda run: [make(image) for image in run], [images[i::50] for i in range(50)]):
            yield len(images) // 50


def streamed(dataset: FilteredDataset, workers: int) -> Iterator[int]:
    for batch in dataset.loader(BATCH, workers):
        yield len(batch["image"])


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--side", type=int, default=256, help="shorter side of the images")
    parser.add_argument("--tars", type=int, default=4)
    parser.add_argument("--samples", type=int, default=1000, help="a tar")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores, total = len(os.sched_getaffinity(0)), options.tars * options.samples
    best: dict[str, float] = {}
    first: dict[str, float] = {}
    cpu: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as home:
        tars = write_tars(home, options.tars, options.samples, options.side)
        index = index_of(tars, Path(home), config=MergeConfig(queries=5))
        selection = f"{home}/selection"

        def dataset(**how: Any) -> FilteredDataset:
            return FilteredDataset(index, "anything", amount=total, selection=selection, **how)

        raw = dataset(decode="raw")
        images = [sample["image"] for sample in raw]
        ways: dict[str, Callable[[], Iterator[int]]] = {
            "read_slice": partial(scanned, tars),
            "decode_alone": partial(decoded, images, cores),
        }
        for decode in ("raw", "tensor", "pil"):
            for workers in (0, 2):
                ways[f"{decode}_{workers}"] = partial(streamed, dataset(decode=decode), workers)
        for _ in range(options.rounds):
            for name, way in ways.items():
                started, before, found = time.perf_counter(), cpu_seconds(), 0
                for count in way():
                    if not found:
                        first[name] = min(first.get(name, 1e9), time.perf_counter() - started)
                    found += count
                assert found == total, (name, found)
                best[name] = min(best.get(name, 1e9), time.perf_counter() - started)
                cpu[name] = min(cpu.get(name, 1e9), cpu_seconds() - before)
    rates = {name: round(total / seconds) for name, seconds in best.items()}
    cpu_ms = {name: round(seconds / total * 1000, 3) for name, seconds in cpu.items()}
    rows = []
    for name in ways:
        decode, _, workers = name.rpartition("_")
        limit = {"raw": "read_slice", "tensor": "decode_alone"}.get(decode)
        if workers.isdigit():
            peer, ratio = (rates[limit], round(best[limit] / best[name], 2)) if limit else (None, None)
            what = f"`FilteredDataset`, JPEGs of {options.side:,} pixels, shuffled: {decode}, {workers} workers"
            rows.append(result.Row(name, what, "samples/s", rates[name], peer, limit or "", ratio, None, cpu_ms[name]))
    figures = {
        "cores": cores,
        "samples_per_second": rates,
        "raw_over_read_slice": round(best["read_slice"] / best["raw_0"], 2),
        "tensor_over_decode_alone": {w: round(best["decode_alone"] / best[f"tensor_{w}"], 2) for w in (0, 2)},
        "cpu_ms": cpu_ms,
        "seconds_to_first_batch": {name: round(seconds, 2) for name, seconds in first.items()},
    }
    result.report("dataset", "export", options, rows, figures)


if __name__ == "__main__":
    main()
