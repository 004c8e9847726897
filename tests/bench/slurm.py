"""Measures what SLURM adds to a partition: hundreds of tiny ones, in as many tasks or in few.

    python -m tests.bench.slurm [--partitions 512] [--record]

Each partition holds one picture, so nearly all the time is the launcher's. `worker` is one process by hand. `tasks=N`
is a whole `clip-batch submit slurm --wait` over N array tasks on a real SLURM of two nodes on this machine; its
`partition` is the seconds for each partition beyond the worker's. A task starts a Python, imports, and leaves a record,
and all share this machine's cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clip_batch.cli import main as clip_batch
from tests import corpus
from tests.bench import result
from tests.servers.slurm_cluster import MAX_ARRAY_SIZE, cluster


def seconds(*arguments: str, env: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "clip_batch", *arguments], check=True, env=env, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--partitions", type=int, default=512)
    options = parser.parse_args()
    count = options.partitions
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as slurm:
        corpus.good_tar(f"{folder}/0.tar", count)

        def planned(name: str) -> str:
            plan = ["plan", "--input", f"{folder}/0.tar", "--model", "fake:8", "--partition-samples", "1"]
            assert clip_batch([*plan, "--output", f"{folder}/{name}"]) == 0
            return f"{folder}/{name}"

        by_hand = seconds("worker", "--output", planned("w"), "--slot", "0", "--slots", "1", env={**os.environ})
        figures["worker"] = {"seconds": round(by_hand, 1), "partition": round(by_hand / count, 4)}
        for tasks in (count, MAX_ARRAY_SIZE, 4):
            submit = ["submit", "slurm", "--output", planned(f"t{tasks}"), "--tasks", str(tasks), "--wait"]
            took = seconds(*submit, "--concurrency", "8", "--memory", "500MB", "--device", "cpu", env=slurm.env)
            figures[f"tasks={tasks}"] = {
                "seconds": round(took, 1),
                "partition": round((took - by_hand) / count, 3),
                "task": round((took - by_hand) / tasks, 2),
            }
    by_hand = figures["worker"]["seconds"]
    rows = [
        result.Row(
            name, f"{count} partitions of one picture on SLURM, {name}", "s", line["seconds"], by_hand, "one worker"
        )
        for name, line in figures.items()
        if name != "worker"
    ]
    result.report("slurm", "launch", options, rows, {"cores": os.cpu_count(), "figures": figures})


if __name__ == "__main__":
    main()
