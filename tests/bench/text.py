"""Captions a second: cut to their length against padded to the model's context, in one run; prints JSON.

python -m tests.bench.text [--model ViT-B-32] [--batch 256] [--rounds 3]

Random weights; captions of 2 to 30 words, most of them short. `single_ms` is one caption of eight words.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from typing import Any

from tests.bench.serve import WORDS


def captions(draw: random.Random, count: int) -> list[str]:
    """Captions of 2 to 30 words, most of them short."""
    return [" ".join(draw.choices(WORDS, k=min(30, 2 + int(draw.expovariate(1 / 8))))) for _ in range(count)]


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """The least of some rounds."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    import open_clip
    import torch

    from clip_batch.encoders.text_tower import TextTower

    draw = random.Random(0)
    texts = captions(draw, options.batch)
    model = open_clip.create_model(options.model).eval()
    tokens, single = (
        open_clip.get_tokenizer(options.model)(some) for some in (texts, [" ".join(draw.choices(WORDS, k=8))])
    )
    cut = TextTower(model)
    with torch.inference_mode():
        difference = float((cut(tokens) - model.encode_text(tokens)).abs().max())
        rates = {
            name: options.batch / seconds(lambda encode=encode: encode(tokens), options.rounds)  # type: ignore[misc]
            for name, encode in (("whole", model.encode_text), ("cut", cut))
        }
        ms = {
            name: 1000 * seconds(lambda encode=encode: encode(single), 10 * options.rounds)  # type: ignore[misc]
            for name, encode in (("whole", model.encode_text), ("cut", cut))
        }
    told = {"captions_s": {name: round(rate, 1) for name, rate in rates.items()}, "single_ms": ms}
    print(json.dumps({"benchmark": "text", **vars(options), **told, "largest_difference": difference}))


if __name__ == "__main__":
    main()
