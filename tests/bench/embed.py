"""embed against its limits, in one process and run: reading, decoding, the model alone, the whole.

python tests/bench/embed.py [--model demo] [--pretrained PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable

import numpy as np

from clip_batch import encoders
from clip_batch.config import EmbedConfig, PlanConfig
from clip_batch.decode import open_image
from clip_batch.demo import data
from clip_batch.plan import load_plan, make_plan
from clip_batch.read import read_slice
from clip_batch.stages.embed import embed
from clip_batch.store import Store
from clip_batch.types import Sample

BATCH = 32


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pretrained", default="")
    parser.add_argument("--tars", type=int, default=8, help="of the demo's 8, 239 samples each")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        tars = data.write_tars(f"{home}/tars")[: arguments.tars]
        planned = PlanConfig(input=tars, model=arguments.model, pretrained=arguments.pretrained, partition_samples=500)
        make_plan(planned, f"{home}/out0")
        plan = load_plan(Store(f"{home}/out0"))
        encoder = encoders.load(plan.encoder, "cpu")

        def read() -> list[Sample]:
            pieces = [piece for partition in plan.partitions for piece in partition.slices]
            return [item for piece in pieces for item in read_slice(piece, plan) if isinstance(item, Sample)]

        samples = read()
        pixels = np.stack([encoder.preprocess(open_image(sample.image or b"", 10**8)) for sample in samples])
        captions = [bytes(sample.caption or b"").decode() for sample in samples]

        def model() -> None:
            for start in range(0, len(pixels), BATCH):
                encoder.encode_images(pixels[start : start + BATCH])
                encoder.encode_texts(captions[start : start + BATCH])

        def decode() -> None:
            for sample in samples:
                encoder.preprocess(open_image(sample.image or b"", 10**8))

        def whole(number: int) -> None:
            out = f"{home}/out{number}"
            make_plan(planned, out)
            embed(out, EmbedConfig(batch_size=BATCH, device="cpu"))

        best: dict[str, float] = {}
        for number in range(1, arguments.rounds + 1):
            for name, work in (
                ("read", read),
                ("decode", decode),
                ("model", model),
                ("embed", lambda number=number: whole(number)),
            ):
                best[name] = min(best.get(name, 1e9), seconds(work))
    rates = {name: round(len(samples) / value, 1) for name, value in best.items()}
    result = {
        "benchmark": "embed",
        "model": arguments.model,
        "cores": len(os.sched_getaffinity(0)),
        "samples": len(samples),
        "samples_per_second": rates,
        "embed_over_model_alone": round(best["model"] / best["embed"], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
