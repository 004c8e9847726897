"""Measures the peak memory, and the pace, of a worker that embeds ever more shards.

    python -m tests.bench.worker [--model demo] [--shards 10 100 1000] [--samples 20] [--record]

The shards are names of one tar, in partitions of 500 samples, so all that grows is how much there is to do.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path

from tests import corpus
from tests.bench import result
from tests.bench.process import run
from tests.bench.text import captions


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--shards", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--samples", type=int, default=20, help="a shard")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as home:
        files = []
        for number, text in enumerate(captions(random.Random(0), options.samples)):
            files += [(f"{number:06d}.jpg", corpus.jpeg(number, 256)), (f"{number:06d}.txt", text.encode())]
        tar = corpus.write_tar(f"{home}/one.tar", files)
        for shards in options.shards:
            folder = Path(home, str(shards))
            folder.mkdir()
            for number in range(shards):
                os.link(tar, folder / f"{number:05d}.tar")
            ours, out = [sys.executable, "-m", "clip_batch"], ["--output", f"{folder}/out"]
            plan = ["plan", "--input", f"{folder}/*.tar", *out, "--model", options.model, "--partition-samples", "500"]
            assert run([*ours, *plan], folder / "plan.log", 600)["exit"] == 0, (folder / "plan.log").read_text()
            done = run([*ours, "embed", *out, "--device", "cpu"], folder / "embed.log", 3600)
            assert done["exit"] == 0, (folder / "embed.log").read_text()
            pace = round(shards * options.samples / done["seconds"], 1)
            found[shards] = {
                "samples_s": pace,
                "peak_mb": done["peak_mb"],
                "anonymous_mb": done["peak_anonymous_mb"],
            }
    what = f"shards of {options.samples} samples, {options.model}"
    rows = [
        result.Row(f"shards_{n}", f"anonymous memory of a worker that embeds {n:,} {what}", "MB", line["anonymous_mb"])
        for n, line in found.items()
    ]
    result.report("worker", "embeddings", options, rows, {"cores": len(os.sched_getaffinity(0)), "by_shards": found})


if __name__ == "__main__":
    main()
