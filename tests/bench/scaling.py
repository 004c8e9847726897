"""Measures what eight times the input costs, over eight times what the input costs.

    python -m tests.bench.scaling [--tars 50000] [--samples 2000] [--rows 50000] [--rounds 3] [--record]

`plan` plans tars of a listing without files; `embed` embeds samples of 256 px by a stub of a model that takes no time;
`merge` merges rows of 256 dimensions, image and text, in index shards of one size, so that there are 8 times as many;
`search` opens such an index and searches once. Figures are CPU seconds of all threads, which other work on the machine
hardly changes, and the best of the rounds. A ratio of 1.0 is in proportion.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import fsspec
import numpy as np

from clip_batch.config import EmbedConfig, MergeConfig, PlanConfig, StorageConfig
from clip_batch.embeddings.embed import embed
from clip_batch.index.merge.merge import merge
from clip_batch.plan.plan import make_plan
from clip_batch.search.searcher import Searcher
from tests.bench import result
from tests.bench.data_path import write_tars
from tests.bench.embed import Stub
from tests.bench.plan import Listing
from tests.fabricated import clustered, make_out

TIMES, DIM, PART = 8, 256, 25_000


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def plans(home: str, size: int) -> float:
    fsspec.register_implementation("listing", Listing, clobber=True)
    config = PlanConfig(input=["listing://data"], model="fake:8")
    with tempfile.TemporaryDirectory(dir=home) as out:
        return seconds(lambda: make_plan(config.input, out, config, storage=StorageConfig({"tars": size})))


def embeds(home: str, size: int) -> float:
    tars = write_tars(home, size // 1000, 1000)
    with tempfile.TemporaryDirectory(dir=home) as out:
        make_plan(tars, out, PlanConfig(model="fake:512", partition_samples=1000))
        return seconds(lambda: embed(out, EmbedConfig(device="cpu"), encoder=Stub(1e9, "fast")))


def merges(home: str, size: int) -> tuple[float, float]:
    """Of the merge, and of opening its index and searching once."""
    with tempfile.TemporaryDirectory(dir=home) as folder:
        images, texts = clustered(size, DIM, 200)
        make_out(f"{folder}/out", images, texts, [PART] * (size // PART))
        config = MergeConfig(index_key="IVF256,SQ8", shard_rows=PART, train_rows=20_000, queries=200)
        built = seconds(lambda: merge(f"{folder}/out", f"{folder}/index", config))

        def first() -> None:
            with Searcher(f"{folder}/index") as searcher:
                searcher.search(texts[0], 10)

        return built, min(seconds(first) for _ in range(5))


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--tars", type=int, default=50_000)
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    costs: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as home:
        for warm, size in ((plans, 100), (embeds, 1000), (merges, PART)):  # what is loaded and started once
            warm(home, size)
        for _ in range(options.rounds):
            for place, times in enumerate((1, TIMES)):
                built, searched = merges(home, times * options.rows)
                found = {"plan": plans(home, times * options.tars), "embed": embeds(home, times * options.samples)}
                found |= {"merge": built, "search": searched}
                for name, value in found.items():
                    best = costs.setdefault(name, [np.inf, np.inf])
                    best[place] = min(best[place], value)
    report: dict[str, dict[str, Any]] = {
        name: {"cpu_s": [round(value, 3) for value in pair], "of_8": round(pair[1] / pair[0] / TIMES, 3)}
        for name, pair in costs.items()
    }
    sizes = {
        "plan": f"plan of {options.tars:,} tars",
        "embed": f"embed of {options.samples:,} images",
        "merge": f"merge of {options.rows:,} x {DIM} in shards of {PART:,}",
        "search": "opening that index and the first search",
    }
    rows = [
        result.Row(
            name, f"CPU of {TIMES} times the input over {TIMES} times its CPU: {what}", "times", report[name]["of_8"]
        )
        for name, what in sizes.items()
    ]
    result.report("scaling", "index", options, rows, {"cores": len(os.sched_getaffinity(0)), **report})


if __name__ == "__main__":
    main()
