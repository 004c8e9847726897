"""Measures where the time goes on a GPU, by open_clip model: the model alone, files to files, decoding.

    python -m tests.bench.gpu [--model ViT-B-32 ViT-L-14 ViT-H-14] [--pretrained PATH] [--device cuda] [--peak 790]
        [--batch 256] [--seconds 5] [--tars 8] [--samples 2000] [--side 256] [--no-compile] [--record]

Weights are random unless a checkpoint is given (for one model); `demo` is the small model in the package. The model
alone is measured eager and compiled: images a second of uint8 batches in the host's memory, and pairs a second with
captions. `flops_used` is the operations of an image (a product and its sum are 2; by torch's counter) times the rate,
over `--peak` TFLOP/s. `files_s` is pairs a second from tars to commits, planning included, the model loaded before.
Decoding is JPEGs to the model's pixels on one thread and on all, and on CUDA to pixels of the file's size by
torchvision there. All of it runs on a CPU as well: `--device cpu --model demo`.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from clip_batch import encoders
from clip_batch.config import EmbedConfig, PlanConfig
from clip_batch.embeddings.embed import embed
from clip_batch.encoders.device import use_torch_threads
from clip_batch.encoders.hub import line
from clip_batch.errors import EncoderError
from clip_batch.plan.plan import make_plan
from clip_batch.types import EncoderSpec
from tests.bench import result
from tests.bench.data_path import photo, write_tars
from tests.bench.engines import checkpoint
from tests.bench.text import captions

LIMIT = 10**9
PHOTOS = 64


def pace(work: Callable[[], int], seconds: float) -> float:
    """Images a second of `work`, which returns how many it did, after one round that does not count."""
    work()
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds or not done:
        done += work()
    return done / spent


def flops(encoder: Any) -> int:
    """Operations of one image's forward pass, without torch's fused attention, which the counter does not know."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            encoder._tower(encoder._blank(1))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


def loaded(spec: EncoderSpec, options: argparse.Namespace, compiled: int) -> tuple[Any, dict[str, float]]:
    """The encoder, and the seconds that it took to load it, compilation included."""
    if options.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(options.device)
    started = time.perf_counter()
    encoder = encoders.load(spec, options.device, compiled=compiled)
    return encoder, {"load_s": round(time.perf_counter() - started, 1)}


def alone(encoder: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The model's images and pairs a second, its share of the peak, and the most memory on the device."""
    one = encoder.preprocess(photo(0, 256), LIMIT)
    batch = np.random.default_rng(0).integers(0, 256, (options.batch, *one.shape), dtype=one.dtype)
    lines = captions(random.Random(0), options.batch)
    rate = pace(lambda: len(encoder.encode_images(batch)), options.seconds)
    pairs = pace(lambda: len(encoders.encode_pairs(encoder, batch, lines)[0]), options.seconds)
    used = flops(encoder)
    cuda = options.device.startswith("cuda")
    return {
        "images_s": round(rate, 1),
        "pairs_s": round(pairs, 1),
        "gflop_image": round(used / 1e9, 2),
        "flops_used": float(f"{used * rate / (options.peak * 1e12):.3g}"),
        "peak_gb": round(torch.cuda.max_memory_allocated(options.device) / 1e9, 2) if cuda else None,
    }


def files_to_files(encoder: Any, spec: EncoderSpec, options: argparse.Namespace, tars: list[str], out: str) -> float:
    """Pairs a second of plan and embed."""
    planned = PlanConfig(
        input=tars,
        model=spec.model,
        pretrained=spec.pretrained,
        preprocess=options.preprocess,
        precision=options.precision,
    )
    config = EmbedConfig(batch_size=options.batch, device=options.device, progress=False)
    started = time.perf_counter()
    make_plan(planned.input, out, planned)
    outcomes = embed(out, config, encoder=encoder)
    seconds = time.perf_counter() - started
    pairs = sum(outcome.rows for outcome in outcomes)
    assert pairs == options.tars * options.samples, outcomes
    return round(pairs / seconds, 1)


def decoding(encoder: Any, options: argparse.Namespace) -> dict[str, float]:
    """Images a second from JPEGs to the model's pixels, by number of threads."""
    jpegs = [photo(seed, options.side) for seed in range(PHOTOS)]
    found = {}
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        with ThreadPoolExecutor(threads, "decode", use_torch_threads, (1,)) as pool:

            def work(pool: ThreadPoolExecutor = pool) -> int:
                return len(list(pool.map(lambda file: encoder.preprocess(file, LIMIT), jpegs)))

            found[f"threads_{threads}"] = round(pace(work, options.seconds), 1)
    return found


def on_device(options: argparse.Namespace) -> dict[str, Any]:
    """Images a second of the same files decoded by nvJPEG through torchvision, at their own size."""
    if not options.device.startswith("cuda"):
        return {"error": "needs CUDA"}
    from torchvision.io import decode_jpeg

    jpegs = [torch.frombuffer(bytearray(photo(seed, options.side)), dtype=torch.uint8) for seed in range(PHOTOS)]

    def work() -> int:
        decode_jpeg(jpegs, device=options.device)
        torch.cuda.synchronize(options.device)
        return len(jpegs)

    try:
        return {"images_s": round(pace(work, options.seconds), 1)}
    except RuntimeError as error:  # a torchvision built without nvJPEG
        return {"error": line(error)}


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--model", nargs="+", default=["ViT-B-32", "ViT-L-14", "ViT-H-14"])
    parser.add_argument("--pretrained", default="")
    parser.add_argument("--precision", default="", help="of all; bf16 on CUDA, fp32 elsewhere")
    parser.add_argument("--preprocess", default="fast", choices=("fast", "exact", "scaled"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak", type=float, default=790, help="TFLOP/s of the device in that precision")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--tars", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2000, help="a tar")
    parser.add_argument("--side", type=int, default=256, help="shorter side of the images")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    options.precision = options.precision or ("bf16" if cuda else "fp32")
    models = []
    with tempfile.TemporaryDirectory() as home:
        tars = write_tars(home, options.tars, options.samples, options.side)
        for number, model in enumerate(options.model):
            weights = options.pretrained or ("" if model == "demo" else checkpoint(model, home))
            spec = encoders.resolve(model, weights, options.preprocess, options.precision)
            encoder, row = loaded(spec, options, 0)
            row = {"model": model, **row, **alone(encoder, options)}
            row["files_s"] = files_to_files(encoder, spec, options, tars, f"{home}/out{number}")
            row["files_over_model"] = round(row["files_s"] / row["pairs_s"], 3)
            row["decode_images_s"] = decoding(encoder, options)
            del encoder  # its memory is not the next one's
            if options.compile:
                try:
                    encoder, found = loaded(spec, options, options.batch)
                    row["compiled"] = {**found, **alone(encoder, options)}
                    del encoder
                except EncoderError as error:
                    row["compiled"] = {"error": str(error)}
            models.append(row)
    rows = []
    for row in models:
        what = f"{row['model']}, {options.precision}, batch of {options.batch}, {options.device}"
        share = row["files_over_model"]
        rows += [
            result.Row(f"{row['model']}_images", f"{what}: the model alone", "images/s", row["images_s"]),
            result.Row(
                f"{row['model']}_files",
                f"{what}: from tars to commits",
                "pairs/s",
                row["files_s"],
                row["pairs_s"],
                "the model alone",
                share,
            ),
        ]
    figures = {
        "device_name": torch.cuda.get_device_name(options.device) if cuda else "CPU",
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "models": models,
        "decode_on_device": on_device(options),
    }
    result.report("gpu", "encoders", options, rows, figures)


if __name__ == "__main__":
    main()
