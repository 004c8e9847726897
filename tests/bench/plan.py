"""Plans a million tars and prints seconds and peak memory as JSON.

    python tests/bench/plan.py [--tars 1000000]

The tars are a listing without files: a brace pattern (a request a tar) and a folder (one listing
call), each in a process of its own, so that each has its own peak. Figures: `expand` SPEC to
shards, `pack` shards to partitions, `plan` the whole of make_plan, `load` the plan read back,
`again` make_plan over the standing plan; in seconds. `rss` is the process's peak in MB.
"""

from __future__ import annotations

import argparse
import json
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

T = TypeVar("T")


class Listing(AbstractFileSystem):  # type: ignore[misc]
    """Tars that are known by name, size and version alone; reading one fails."""

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
        result = call()
        figures[name] = round(time.perf_counter() - started, 2)
        return result

    options: dict[str, Any] = {"tars": tars}
    with tempfile.TemporaryDirectory() as output:
        config = PlanConfig(input=[spec], model="fake:8")
        timed("plan", lambda: make_plan(config, output, StorageConfig(options)))
        figures["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
        shards = timed("expand", lambda: expand_inputs([spec], "tar", options))
        timed("pack", lambda: pack(shards, PartitionTarget("bytes", 4_000_000_000)))
        plan = timed("load", lambda: load_plan(Store(output)))
        assert sum(len(partition.slices) for partition in plan.partitions) == tars
        timed("again", lambda: make_plan(config, output, StorageConfig(options)))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tars", type=int, default=1_000_000)
    tars = parser.parse_args().tars
    specs = {"brace": f"listing://data/{{0000000..{tars - 1:07d}}}.tar", "folder": "listing://data"}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = {name: pool.apply(measure, (spec, tars)) for name, spec in specs.items()}
    print(json.dumps({"tars": tars, **found}))


if __name__ == "__main__":
    main()
