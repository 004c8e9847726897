"""How long a folder of many pictures takes to plan, to plan again unchanged, and to extend by a few.

    python -m tests.bench.folders [--files 1000000] [--home DIR]

The pictures are empty files, so that listing and looking at them is all that is measured; nothing is embedded.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

from clip_batch.config import PlanConfig
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.samples.listings import read
from clip_batch.storage.store import Store

FOLDER = 10_000
"""Files of a folder below the one that is planned."""


def fill(folder: Path, first: int, count: int) -> None:
    for number in range(first, first + count):
        if number % FOLDER == 0 or number == first:
            (folder / f"{number // FOLDER:04d}").mkdir(parents=True, exist_ok=True)
        os.close(os.open(f"{folder}/{number // FOLDER:04d}/{number:08d}.jpg", os.O_CREAT, 0o644))


def main() -> None:
    """Print a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--home", default=tempfile.gettempdir())
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="folders-", dir=options.home))
    folder, out = home / "in", str(home / "out")
    config = PlanConfig(model="fake:8", format="files", try_model=False, extend=True)
    try:
        fill(folder, 0, options.files)
        for what in ("plan", "unchanged", "extended by 20"):
            if what == "extended by 20":
                Store(out).create("_clip_batch/commits/0000.json", b"{}")
                fill(folder, options.files, 20)
            begun = time.perf_counter()
            plan = make_plan(folder, out, config)
            print(f"{what}: {time.perf_counter() - begun:.1f} s, {len(plan.partitions)} partitions", flush=True)
        begun = time.perf_counter()
        piece = load_plan(Store(out)).partitions[0].slices[0]
        count = len(read(plan.listings, piece.shard.etag or "", {}, piece.start, piece.stop))
        print(f"a worker's first slice: {time.perf_counter() - begun:.1f} s, {count:,} samples")
        print(f"memory at most: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
