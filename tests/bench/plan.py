"""Measures the seconds and the peak memory of planning a million tars.

    python -m tests.bench.plan [--tars 1000000] [--record]

The tars are a listing without files, named by a brace pattern (a request for each tar) and by a folder (one listing).
Each runs in a process of its own, so that each has its own peak. Figures, in seconds: `expand` turns the SPEC into
shards, `pack` shards into partitions, `plan` is all of make_plan, `load` reads the plan back, `again` is make_plan over
the plan that stands. `rss` is the process's peak in MB. The listing cannot be read, so side-cars cost nothing here.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.spec import AbstractFileSystem

from clip_batch.config import PlanConfig, StorageConfig
from clip_batch.plan.pack import PartitionTarget, pack
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.plan.specs import expand_inputs
from clip_batch.storage.store import Store
from tests.bench import result

T = TypeVar("T")


class Listing(AbstractFileSystem):  # type: ignore[misc]
    """Tars that have a name, a size and a version, but no content: reading one fails."""

    protocol = "listing"
    cachable = False

    def __init__(self, tars: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.tars = tars

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        if not path.endswith(".tar"):
            return {"name": path, "size": 0, "type": "directory"}
        number = int(path[-11:-4])
        return {"name": path, "size": 300_000_000 + number % 977, "type": "file", "ETag": f'"{number:032x}"'}

    def find(self, path: str, detail: bool = False, **_: Any) -> dict[str, Any]:
        return {(name := f"{path}/{number:07d}.tar"): self.info(name) for number in range(self.tars)}


def measure(spec: str, tars: int) -> dict[str, float]:
    fsspec.register_implementation("listing", Listing, clobber=True)
    figures: dict[str, float] = {}

    def timed(name: str, call: Callable[[], T]) -> T:
        started = time.perf_counter()
        answer = call()
        figures[name] = round(time.perf_counter() - started, 2)
        return answer

    options: dict[str, Any] = {"tars": tars}
    with tempfile.TemporaryDirectory() as output:
        config = PlanConfig(input=[spec], model="fake:8")
        timed("plan", lambda: make_plan(config.input, output, config, storage=StorageConfig(options)))
        figures["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
        shards = timed("expand", lambda: expand_inputs([spec], "tar", options).shards)
        timed("pack", lambda: pack(shards, PartitionTarget("bytes", 4_000_000_000)))
        plan = timed("load", lambda: load_plan(Store(output)))
        assert sum(len(partition.slices) for partition in plan.partitions) == tars
        timed("again", lambda: make_plan(config.input, output, config, storage=StorageConfig(options)))
    return figures


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--tars", type=int, default=1_000_000)
    options = parser.parse_args()
    tars = options.tars
    specs = {"brace": f"listing://data/{{0000000..{tars - 1:07d}}}.tar", "folder": "listing://data"}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        figures = {name: pool.apply(measure, (spec, tars)) for name, spec in specs.items()}
    rows = []
    for name, what in (("brace", "named by a brace pattern"), ("folder", "by one listing")):
        peak = figures[name]["rss"]
        rows += [
            result.Row(name, f"plan of {tars:,} tars {what} (peak {peak:,} MB)", "s", figures[name]["plan"]),
            result.Row(f"{name}_load", f"that plan, {what}, read back by a worker", "s", figures[name]["load"]),
            result.Row(f"{name}_again", f"planned again over that plan, {what}", "s", figures[name]["again"]),
        ]
    result.report("plan", "plan", options, rows, figures)


if __name__ == "__main__":
    main()
