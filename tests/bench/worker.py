"""Peak memory of a worker that embeds ever more shards, and its pace; prints JSON.

python -m tests.bench.worker [--model demo] [--shards 10 100 1000] [--samples 20]

The shards are names of one tar, in partitions of 500 samples: all that grows is how much there is to do.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

from tests import corpus
from tests.bench.compare import build
from tests.bench.text import captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
            assert build([*ours, *plan], folder / "plan.log", 600)["exit"] == 0, (folder / "plan.log").read_text()
            result = build([*ours, "embed", *out, "--device", "cpu"], folder / "embed.log", 3600)
            assert result["exit"] == 0, (folder / "embed.log").read_text()
            pace = round(shards * options.samples / result["seconds"], 1)
            found[shards] = {
                "samples_s": pace,
                "peak_mb": result["peak_mb"],
                "anonymous_mb": result["peak_anonymous_mb"],
            }
    print(
        json.dumps({"benchmark": "worker", **vars(options), "cores": len(os.sched_getaffinity(0)), "by_shards": found})
    )


if __name__ == "__main__":
    main()
