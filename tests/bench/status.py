"""Measures the seconds of `clip-batch status`, as a process, over an OUT of many partitions.

    python -m tests.bench.status [--partitions 100000] [--workers 1000] [--record]

`records` has the records that workers leave; `tasks` has a record for each partition, as tasks of one partition leave
them; `commits` has no records, so every commit is read; `start` is the same command over a plan of one partition.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from clip_batch.embeddings import workers
from clip_batch.plan import paths
from clip_batch.types import Commit
from tests import fabricated
from tests.bench import result


def fill(out: Path, partitions: int, share: int) -> None:
    """A plan, a commit for all but `share` partitions, and a record a worker of `share` partitions."""
    plan = fabricated.make_plan(out, partitions)
    for folder in (paths.COMMITS, paths.WORKERS):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for first in range(0, partitions, share):
        told = {}
        for number in range(first, min(first + share, partitions)):
            shard = plan.partitions[number].slices[0].shard.url
            files = {f"{name}/{name}_{number}-0a1b2c3d.npy": {"bytes": 10**7, "sha256": "0" * 64} for name in "abc"}
            counts = {shard: {"seen": 10_010, "embedded": 10_000, "failed": 10}}
            failed = {"undecodable_image": 10}
            commit = Commit(
                number, "0a1b2c3d", 10_000, 512, "0" * 16, plan.digest, files, counts, failed, {}, 0, 60.0, "n"
            )
            if number:
                (out / paths.COMMITS / f"{plan.name(number)}.json").write_text(json.dumps(asdict(commit), indent=1))
            told[str(number)] = {
                key: getattr(commit, key) for key in ("rows", "failed", "warnings", "started", "finished")
            }
        record = workers.WorkerRecord("n:1", "slurm 1_1", 1, 0, time.time(), False, 10_000, [0], told)
        (out / paths.WORKERS / f"n-1-{first:08x}.json").write_text(json.dumps(vars(record)))


def seconds(out: Path, expected: int) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-m", "clip_batch", "status", "--json", "--output", str(out)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    took = time.perf_counter() - started
    assert found["rows"] == 10_000 * expected, found["rows"]
    return round(took, 2)


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--partitions", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1_000)
    options = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, share in (("records", options.partitions // options.workers), ("tasks", 1)):
            out = Path(folder, name)
            fill(out, options.partitions, share)
            figures[name] = min(seconds(out, options.partitions - 1) for _ in range(3))
        shutil.rmtree(out / paths.WORKERS)
        figures["commits"] = min(seconds(out, options.partitions - 1) for _ in range(3))
        fill(Path(folder, "one"), 1, 1)
        figures["start"] = min(seconds(Path(folder, "one"), 0) for _ in range(3))
    ways = {
        "records": f"records of {options.workers:,} workers ({figures['start']} s of it Python's start)",
        "tasks": "a worker's record for each",
        "commits": "no records, every commit read",
    }
    rows = [
        result.Row(way, f"status of {options.partitions:,} partitions, {how}", "s", figures[way], target=2)
        for way, how in ways.items()
    ]
    result.report("status", "embeddings", options, rows, {"seconds": figures})


if __name__ == "__main__":
    main()
