"""Measures captions a second: cut to their length, beside padded to the model's context, in one run.

    python -m tests.bench.text [--model ViT-B-32] [--batch 256] [--rounds 3] [--record]

Weights are random; captions have 2 to 30 words, most of them few. `single_ms` is one caption of eight words.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from tests.bench import result

WORDS = ["red", "blue", "small", "old", "shining", "cat", "house", "river", "train", "flag", "bread", "night", "snow"]


def captions(draw: random.Random, count: int) -> list[str]:
    """Captions of 2 to 30 words, most of them short."""
    return [" ".join(draw.choices(WORDS, k=min(30, 2 + int(draw.expovariate(1 / 8))))) for _ in range(count)]


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest of some rounds."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    import open_clip
    import torch

    from clip_batch.encoders.text_tower import TrimmedTextTower

    draw = random.Random(0)
    texts = captions(draw, options.batch)
    model = open_clip.create_model(options.model).eval()
    tokens, single = (
        open_clip.get_tokenizer(options.model)(some) for some in (texts, [" ".join(draw.choices(WORDS, k=8))])
    )
    cut = TrimmedTextTower(model)
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
    captions_s = {name: round(rate, 1) for name, rate in rates.items()}
    single_ms = {name: round(value, 1) for name, value in ms.items()}
    what, peer = f"captions, {options.model}, batch of {options.batch}, cut to their length", "padded to the context"
    more = round(rates["cut"] / rates["whole"], 2)
    rows = [
        result.Row("batch", what, "captions/s", captions_s["cut"], captions_s["whole"], peer, more),
        result.Row(
            "single",
            "one caption of eight words, cut to its length",
            "ms",
            single_ms["cut"],
            single_ms["whole"],
            peer,
            round(ms["whole"] / ms["cut"], 2),
        ),
    ]
    figures = {"captions_s": captions_s, "single_ms": single_ms, "largest_difference": difference}
    result.report("text", "encoders", options, rows, figures)


if __name__ == "__main__":
    main()
