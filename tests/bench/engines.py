"""Measures images a second of the image tower alone: eager, compiled and int8, in interleaved rounds.

    python -m tests.bench.engines [--model ViT-B-32] [--pretrained PATH] [--batch 32] [--rounds 8] [--record]

Without a checkpoint the weights are random. `load_s` is the seconds of loading the model, compiling or quantizing it
included; cosines are with eager's vectors, over one batch of the demo's pictures.
"""

from __future__ import annotations

import tempfile
import time

import numpy as np

from clip_batch import encoders
from clip_batch.demo import data
from clip_batch.encoders import Model
from clip_batch.encoders.device import torch_threads
from tests.bench import result


def checkpoint(model: str, home: str) -> str:
    """Save random weights for an open_clip model in the folder `home`; returns their path."""
    import open_clip
    import torch

    path = f"{home}/random.pt"
    torch.save(open_clip.create_model(model).state_dict(), path)
    return path


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained", default="")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    engines: dict[str, Model] = {}
    load: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as home:
        weights = options.pretrained or checkpoint(options.model, home)
        for name, precision, compiled in (
            ("eager", "fp32", 0),
            ("compiled", "fp32", options.batch),
            ("int8", "int8", 0),
        ):
            spec = encoders.resolve(options.model, weights, "fast", precision)
            started = time.perf_counter()
            engines[name] = encoders.load(spec, "cpu", compiled=compiled)
            load[name] = round(time.perf_counter() - started, 1)
    images = data.load()["image"].to_pylist()[: options.batch]
    pixels = np.stack([engines["eager"].preprocess(image, 10**8) for image in images])
    vectors = {name: engine.encode_images(pixels) for name, engine in engines.items()}
    wall, cpu = dict.fromkeys(engines, 1e9), dict.fromkeys(engines, 1e9)
    for _ in range(options.rounds):
        for name, engine in engines.items():
            started, used = time.perf_counter(), time.process_time()
            engine.encode_images(pixels)
            wall[name] = min(wall[name], time.perf_counter() - started)
            cpu[name] = min(cpu[name], time.process_time() - used)
    images_s = {name: round(len(images) / value, 1) for name, value in wall.items()}
    cpu_ms = {name: round(1000 * value / len(images), 1) for name, value in cpu.items()}
    what = f"image tower alone, {options.model}, batch of {len(images)}, all cores"
    rows = [
        result.Row(
            name,
            f"{what}: {name}",
            "images/s",
            images_s[name],
            None if name == "eager" else images_s["eager"],
            "eager",
            None if name == "eager" else round(wall["eager"] / wall[name], 2),
            None,
            cpu_ms[name],
        )
        for name in engines
    ]
    figures = {
        "threads": torch_threads(),
        "load_s": load,
        "images_s": images_s,
        "cpu_ms_image": cpu_ms,
        "cosine_least": {name: float((vectors["eager"] * rows).sum(1).min()) for name, rows in vectors.items()},
    }
    result.report("engines", "encoders", options, rows, figures)


if __name__ == "__main__":
    main()
