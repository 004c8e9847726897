"""The model alone, from uint8 pixels in the host's memory to vectors there: eager, and in other sizes of batches.

The part `files` measures it compiled, in the batches of its own runs, by `alone`. Two threads call the encoder at once,
as `embed` does; one shows how much of the copies the second one hides.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from tests.bench.gpu_parts import Part
from tests.bench.gpu_parts.encoder import Work, image_gflop, loaded, resolved

NEED = {"ViT-L-14": 30.0}
"""Seconds that an encoder needs to be loaded, compiled and measured; others 16."""


def run(part: Part) -> None:
    options = part.options
    first, *others = options.model
    large, small = ((512, 1024, 256), (1024, 512, 256)) if options.cuda else ((8,), (8,))
    # What a decision needs comes first; the budget seldom lets the last ones through.
    tries = [(first, large[0], False)]
    tries += [(first, size, True) for size in large[1:2]]
    tries += [(model, small[0], False) for model in others]
    tries += [(model, size, True) for model in others for size in small[1:]]
    tries += [(first, size, True) for size in large[2:]]
    tries += [(first, size, False) for size in large[1:]]
    for model, size, compiled in tries:
        need = NEED.get(model, 16.0) * (1 if compiled else 0.5)
        part.attempt(f"{model}, {name(compiled)}, batches of {size}", need, measure, part, model, size, compiled)


def name(compiled: bool) -> str:
    return "compiled" if compiled else "eager"


def ceiling(part: Part) -> float | None:
    """TFLOP/s of the part `device`, if it came so far."""
    try:
        with open(f"{part.options.home}/device.json") as file:
            found: float | None = json.load(file)["figures"].get("ceiling_tflops")
            return found
    except OSError:
        return None


def measure(part: Part, model: str, size: int, compiled: bool) -> None:
    encoder, load = loaded(resolved(model, part.options), part.options, size if compiled else 0)
    alone(part, model, size, compiled, encoder, load)


def alone(part: Part, model: str, size: int, compiled: bool, encoder: Any, load: float) -> float:
    """Measure an encoder that took `load` seconds to load: pairs a second."""
    options = part.options
    seconds = 0.2 if options.quick else 1.5
    work = Work.of(encoder, size, options.precision, options.device)
    key, what = f"{model}_{name(compiled)}_{size}", f"{model} {name(compiled)} {size}"
    one = work.images(seconds / 2)
    two = work.images(seconds, 2)
    gflop, most = image_gflop(model), ceiling(part)
    part.row(f"{key}_images", f"{what}: images, two threads", "images/s", two, one, "one thread")
    if gflop and most:
        part.row(f"{key}_share", f"{what}: of them", "TFLOP/s", two * gflop / 1000, most, "the product")
    pairs = work.pairs(seconds, 2)
    part.row(f"{key}_pairs", f"{what}: pairs, two threads", "pairs/s", pairs, two, "images alone")
    figures: dict[str, Any] = {"load_s": load, "gflop_image": gflop, "texts_s": work.texts(seconds / 2, 2)}
    if options.cuda:
        figures["peak_gb"] = torch.cuda.max_memory_allocated(options.device) / 1e9
    part.figure(key, figures)
    if options.cuda and part.options.part == "model":
        part.attempt(f"{what}: kernels", 3, lambda: part.figure(f"{key}_kernels_ms", kernels(work)))
    return pairs


def kernels(work: Work, most: int = 14) -> dict[str, float]:
    """Milliseconds of the GPU in one batch, by kernel, and how many times it ran; the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work.encoder.encode_images(work.batches[0])
        torch.cuda.synchronize()
    rows = sorted(profiled.key_averages(), key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows) / 1000
    return {"all": total, **{f"{row.key[:90]} x{row.count}": row.self_device_time_total / 1000 for row in rows[:most]}}
