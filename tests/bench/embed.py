"""Measures embed beside its limits, in one process and run: reading, decoding, and the model alone.

    python -m tests.bench.embed [--model demo] [--pretrained PATH] [--stub 2000] [--record]

With `--stub N` an encoder that only sleeps, at N images a second, takes the place of the model, and the images are of
256 x 256 for its 224 x 224. That shows what embed adds to a GPU.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from clip_batch import encoders
from clip_batch.config import EmbedConfig, PlanConfig
from clip_batch.demo import data
from clip_batch.embeddings.embed import embed
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.samples import read_slice
from clip_batch.storage.store import Store
from clip_batch.types import Sample
from tests.bench import result
from tests.bench.data_path import cpu_seconds, write_tars

if TYPE_CHECKING:
    from clip_batch.encoders.encoder import Array, Pixels

BATCH = 32


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Stub:
    """An encoder of `rate` images a second that computes nothing, and open_clip's transform to 224 x 224."""

    dim = 512
    has_text = True

    def __init__(self, rate: float, mode: str) -> None:
        from open_clip.transform import image_transform

        from clip_batch.encoders import preprocess

        self.rate = rate
        self.preprocess = preprocess.from_transform(image_transform(224, is_train=False), mode).prepare
        self.row = np.zeros((1, self.dim), np.float32)
        self.row[0, 0] = 1

    def encode_images(self, batch: Pixels) -> Array:
        time.sleep(len(batch) / self.rate)
        return np.repeat(self.row, len(batch), 0)

    def encode_texts(self, texts: Sequence[str]) -> Array:
        return np.repeat(self.row, len(texts), 0)


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pretrained", default="")
    parser.add_argument(
        "--tars", type=int, default=8, help="of the demo's 8, of 239 samples each; with --stub of 1,000"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stub", type=float, default=0, help="images a second of an encoder that only sleeps")
    parser.add_argument("--preprocess", choices=("fast", "exact"), default="fast")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        count = options.tars
        tars = write_tars(home, count, 1000) if options.stub else data.write_tars(f"{home}/tars")[:count]
        planned = PlanConfig(
            input=tars,
            model="fake:512" if options.stub else options.model,
            pretrained=options.pretrained,
            preprocess=options.preprocess,
            partition_samples=4000 if options.stub else 500,
        )
        make_plan(planned.input, f"{home}/out0", planned)
        plan = load_plan(Store(f"{home}/out0"))
        stub = Stub(options.stub, options.preprocess) if options.stub else None
        encoder = stub or encoders.load(plan.encoder, "cpu")

        def read() -> list[Sample]:
            pieces = [piece for partition in plan.partitions for piece in partition.slices]
            return [item for piece in pieces for item in read_slice(piece, plan) if isinstance(item, Sample)]

        samples = read()
        preprocess = np.stack([encoder.preprocess(sample.image or b"", 10**8) for sample in samples])
        captions = [bytes(sample.caption or b"").decode() for sample in samples]

        def model() -> None:
            for start in range(0, len(preprocess), BATCH):
                encoder.encode_images(preprocess[start : start + BATCH])
                encoder.encode_texts(captions[start : start + BATCH])

        def decode() -> None:
            for sample in samples:
                encoder.preprocess(sample.image or b"", 10**8)

        def whole(number: int) -> None:
            embed(f"{home}/out{number}", EmbedConfig(batch_size=BATCH, device="cpu"), encoder=encoder)

        best: dict[str, float] = {}
        cpu = 1e9
        for number in range(1, options.rounds + 1):
            make_plan(planned.input, f"{home}/out{number}", planned)
            for name, work in (
                ("read", read),
                ("decode", decode),
                ("model", model),
                ("embed", lambda number=number: whole(number)),
            ):
                used = cpu_seconds()
                best[name] = min(best.get(name, 1e9), seconds(work))
                if name == "embed":
                    cpu = min(cpu, cpu_seconds() - used)
    rates = {name: round(len(samples) / value, 1) for name, value in best.items()}
    model_name = f"an encoder that sleeps, at {options.stub:.0f} images a second" if stub else options.model
    ratio = round(best["model"] / best["embed"], 3)
    cpu_ms = round(1000 * cpu / len(samples), 2)
    what = f"embed with {model_name}, loaded before"
    rows = [
        result.Row("embed", what, "pairs/s", rates["embed"], rates["model"], "the model alone", ratio, None, cpu_ms),
        result.Row("decode", "decoding on one thread in that run", "images/s", rates["decode"]),
    ]
    figures = {
        "cores": len(os.sched_getaffinity(0)),
        "samples": len(samples),
        "samples_per_second": rates,
        "embed_over_model_alone": ratio,
        "embed_cpu_ms": cpu_ms,
    }
    result.report("embed", "embeddings", options, rows, figures)


if __name__ == "__main__":
    main()
