"""Measures how near JPEGs that were decoded to fewer pixels come to `exact`, by how many pixels were left (the gap).

    python -m tests.bench.gaps [--model demo] [--pretrained PATH] [--photos FOLDER] [--sides 512 1024 2048 4096]
        [--gaps 1 1.5 2 3] [--count 24] [--grain 4] [--record]

A gap of 2 means that a picture is decoded to at least twice the sides that it is then resized to; "none" is `fast`.
Pictures are those of the folder, otherwise the demo's (64 x 64), brought to each shorter side, with grain added
where they were enlarged (its standard deviation in levels), and saved as JPEGs of quality 90. Pixels are compared by
PSNR, over all pictures and of the worst one; vectors by their cosines with those of `exact`. `ms` is the mean time from
file to pixels on one thread.
"""

from __future__ import annotations

import io
import time
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_batch import encoders
from clip_batch.demo import data
from tests import corpus
from tests.bench import result

LIMIT = 10**9


def files(folder: str, count: int) -> list[bytes]:
    if folder:
        return [path.read_bytes() for path in sorted(Path(folder).iterdir())[:count]]
    images: list[bytes] = data.load()["image"].to_pylist()
    return images[:: len(images) // count][:count]


def large(file: bytes, side: int, grain: float, seed: int) -> bytes:
    """The picture with that shorter side, as a JPEG."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    times = side / min(image.size)
    image = image.resize([round(times * one) for one in image.size], Image.Resampling.LANCZOS)
    if times > 1:
        noise = np.random.default_rng(seed).normal(0, grain, (*image.size[::-1], 3)).astype(np.float32)
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).round().astype(np.uint8))
    return corpus.encode(image, quality=90)


def psnr(squares: Any) -> float:
    return round(float(10 * np.log10(255**2 / max(squares, 1e-9))), 1)


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pretrained", default="")
    parser.add_argument("--photos", default="")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--gaps", type=float, nargs="+", default=[1, 1.5, 2, 3])
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--grain", type=float, default=4)
    options = parser.parse_args()
    encoder: Any = encoders.load(encoders.resolve(options.model, options.pretrained, "exact"), "cpu")
    scaled: Any = encoders.load(encoders.resolve(options.model, options.pretrained, "scaled"), "cpu")
    lines = []
    for side in options.sides:
        jpegs = [large(one, side, options.grain, seed) for seed, one in enumerate(files(options.photos, options.count))]
        exact = np.stack([encoder.preprocess(one, LIMIT) for one in jpegs])
        wanted = encoder.encode_images(exact)
        for gap in [inf, *options.gaps]:
            prepare = partial(scaled._preprocess, gap=gap)
            started = time.perf_counter()
            found = np.stack([prepare(one, LIMIT) for one in jpegs])
            seconds = time.perf_counter() - started
            squares = ((found.astype(float) - exact) ** 2).mean((1, 2, 3))
            cosine = (encoder.encode_images(found) * wanted).sum(1)
            line: dict[str, Any] = {"side": side, "gap": "none" if gap == inf else gap}
            line |= {"psnr": psnr(squares.mean()), "psnr_least": psnr(squares.max())}
            line |= {"cosine_mean": round(float(cosine.mean()), 6), "cosine_least": round(float(cosine.min()), 6)}
            lines.append({**line, "ms": round(1000 * seconds / len(jpegs), 2)})
    rows = [
        result.Row(
            f"psnr_{line['side']}_{line['gap']}",
            f"worst picture's PSNR beside `exact` at {line['side']:,} pixels, a gap of {line['gap']} "
            f"(least cosine {line['cosine_least']})",
            "dB",
            line["psnr_least"],
        )
        for line in lines
    ]
    result.report("gaps", "encoders", options, rows, {"lines": lines})


if __name__ == "__main__":
    main()
