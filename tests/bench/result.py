"""The results of the benchmarks: one JSON object on standard output, and with `--record` a file in docs/benchmarks/.

`docs/benchmarks.md` is generated from those files. Every script makes its parser by `parser`, and ends with `report`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests import ROOT

RESULTS = ROOT / "docs" / "benchmarks"

STARTED = datetime.now(UTC)
LOAD_BEFORE = round(os.getloadavg()[0], 1)
"""The load average of the last minute when the script started, before the benchmark adds its own."""

Figure = float | str | None
"""One number, a text such as "9.5 to 11.1" where a run gave a range, or None where nothing was measured."""


@dataclass(frozen=True)
class Row:
    """A line of `docs/benchmarks.md`: what was measured, ours and the peer's figure in `unit`.

    `key` names the row within its file. `ratio` says how many times better ours is than the peer's, and is compared
    with `target`. `cpu_ms` are milliseconds of CPU for each item, over all processes that work on it.
    """

    key: str
    what: str
    unit: str
    ours: Figure
    peer: Figure = None
    peer_name: str = ""
    ratio: Figure = None
    target: Figure = None
    cpu_ms: Figure = None


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring as it is written, and knows `--record`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "also write docs/benchmarks/NAME.json; NAME is the benchmark's own unless it is given"
    made.add_argument("--record", nargs="?", const="", metavar="NAME", help=text)
    return made


def report(
    benchmark: str, stage: str, options: argparse.Namespace, rows: Sequence[Row], figures: Mapping[str, Any]
) -> None:
    """Print all figures as JSON; with `--record` write them, the rows and what they were measured with.

    `stage` is the folder of `clip_batch/` that the benchmark measures.
    """
    arguments = {name: value for name, value in vars(options).items() if name != "record"}
    print(json.dumps({"benchmark": benchmark, **arguments, **figures}))
    if options.record is None:
        return
    RESULTS.mkdir(exist_ok=True)
    described = describe(benchmark, stage, options, rows, figures)
    (RESULTS / f"{options.record or benchmark}.json").write_text(json.dumps(described, indent=1, default=str) + "\n")


def describe(
    benchmark: str, stage: str, options: argparse.Namespace, rows: Sequence[Row], figures: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of a file of `RESULTS`: the rows, all figures, and what they were measured with."""
    arguments = {name: value for name, value in vars(options).items() if name != "record"}
    return {
        "benchmark": benchmark,
        "stage": stage,
        "script": f"tests/bench/{benchmark}.py",
        "command": shlex.join(["python", "-m", f"tests.bench.{benchmark}", *sys.argv[1:]]),
        "date": f"{STARTED:%Y-%m-%d}",
        "machine": machine(),
        "load": LOAD_BEFORE,
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
        "figures": {**arguments, **figures},
    }


def machine() -> dict[str, Any]:
    """The processor's name, the cores this process may use, and the memory in GiB."""
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
    }


def versions() -> dict[str, str | None]:
    """The versions of Python and of the libraries that most figures depend on; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "faiss-cpu", "numpy", "pyarrow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
