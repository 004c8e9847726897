"""How long a folder of many pictures takes to plan, to plan again unchanged, and to extend by a few.

    python -m tests.bench.folders [--files 1000000] [--home DIR] [--record]

The pictures are empty files, so that listing and looking at them is all that is measured; nothing is embedded.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from clip_batch.config import PlanConfig
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.samples.listings import read
from clip_batch.storage.store import Store
from tests.bench import result

FOLDER = 10_000
"""Files of a folder below the one that is planned."""


def fill(folder: Path, first: int, count: int) -> None:
    for number in range(first, first + count):
        if number % FOLDER == 0 or number == first:
            (folder / f"{number // FOLDER:04d}").mkdir(parents=True, exist_ok=True)
        os.close(os.open(f"{folder}/{number // FOLDER:04d}/{number:08d}.jpg", os.O_CREAT, 0o644))


def main() -> None:
    """Report the seconds of each step, and the memory of all."""
    parser = result.parser(__doc__)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--home", default=tempfile.gettempdir())
    options = parser.parse_args()
    home, rows = Path(tempfile.mkdtemp(prefix="folders-", dir=options.home)), list[result.Row]()
    folder, out = home / "in", str(home / "out")
    config = PlanConfig(model="fake:8", format="files", try_model=False, extend=True)

    def timed(key: str, what: str, call: Callable[[], object]) -> None:
        begun = time.perf_counter()
        call()
        rows.append(result.Row(key, what, "s", round(time.perf_counter() - begun, 2)))

    def first_slice() -> None:
        plan = load_plan(Store(out))
        piece = plan.partitions[0].slices[0]
        assert read(plan.listings, piece.shard.etag or "", {}, piece.start, piece.stop)

    try:
        fill(folder, 0, options.files)
        timed("plan", f"plan of a folder of {options.files:,} pictures", lambda: make_plan(folder, out, config))
        timed("again", "planned again, unchanged", lambda: make_plan(folder, out, config))
        Store(out).create("_clip_batch/commits/0000.json", b"{}")
        fill(folder, options.files, 20)
        timed("extend", "extended by 20 pictures", lambda: make_plan(folder, out, config))
        timed("slice", "a worker's first slice, read from the plan", first_slice)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
        rows.append(result.Row("memory", "memory of all these at most", "MB", peak))
        result.report("folders", "plan", options, rows, {})
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
