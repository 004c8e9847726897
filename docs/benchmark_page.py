"""Makes `docs/benchmarks.md` from the result files in `docs/benchmarks/`, which the scripts in `tests/bench/` write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.test_layers import FOLDERS

RESULTS = Path(__file__).parent / "benchmarks"

STAGES = (*FOLDERS, "repository")
"""What a result may be of, in the order of the page: a folder of `clip_batch/`, or the repository as a whole."""

TEN = (
    ("How many times faster than webdataset are tars read?", "tar", "samples"),
    ("How many times faster are pictures made ready for the model?", "data_path", "fast"),
    ("How many ViT-L/14 pairs a second from tars to commits, on one H200?", "gpu", "files_ViT-L-14_1"),
    ("How many pairs a second from tars to vectors, beside clip-retrieval, on a CPU?", "pairs", "fp32"),
    ("How long does one worker in four that is four times slower delay the end?", "slow_worker", "share"),
    (
        "How long does a build of a million vectors take by default, beside autofaiss?",
        "compare",
        "seconds",
    ),
    ("How long does one search of it take?", "compare", "query"),
    ("How many text queries a second does the service answer, beside clip-retrieval's?", "serve", "clients_32"),
    ("How long does it take to plan a million tars?", "plan", "folder"),
    ("How long does it take to ask for the state of 100,000 partitions?", "status", "records"),
)
"""The questions at the head of the page: the question, the result file, the key of its row."""

HEAD = """# Benchmarks

This page is generated from the result files in [benchmarks/](benchmarks/): change those by running a script with
`--record`, then run `make docs`. `make bench` runs most scripts (`BENCHES` names which); each prints one JSON object.

Only ratios within one run mean much, as the machine is shared: "load" is its load average before a run, where it is
known. "Ratio" says how many times better ours is than the peer's figure. "CPU an item" is CPU time over all
processes. Results marked as transferred come from the page as it was written by hand until 2026-11-26: what it did not
say, such as the load, is not known. What one GPU gave is told in
[gpu.md](gpu.md). What was tried and did not help is in [experiments.md](experiments.md).
"""

COLUMNS = """| what | ours | peer | ratio | target | CPU an item | load | date | script |
|---|---|---|---|---|---|---|---|---|"""


def benchmark_page() -> str:
    """The Markdown text of the page."""
    results = load_results()
    parts = [HEAD, "## Ten figures", _ten(results)]
    stages = [stage for stage in STAGES if any(result["stage"] == stage for result in results.values())]
    for stage in stages:
        lines = [
            _line(result, row) for result in results.values() if result["stage"] == stage for row in result["rows"]
        ]
        parts += [f"## {stage}", "\n".join([COLUMNS, *lines])]
    parts += ["## Runs", _runs(results)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def load_results() -> dict[str, dict[str, Any]]:
    """Every result file by its name, in order of name. ValueError where one names a stage that is not known."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    for name, result in results.items():
        if result["stage"] not in STAGES:
            raise ValueError(f"docs/benchmarks/{name}.json has the stage {result['stage']!r}: take one of {STAGES}")
    return results


def find_row(results: dict[str, dict[str, Any]], name: str, key: str) -> dict[str, Any]:
    """The row of a result file by its key. KeyError where either is absent."""
    for row in results[name]["rows"]:
        if row["key"] == key:
            return dict(row)
    raise KeyError(f"docs/benchmarks/{name}.json has no row {key!r}")


def _ten(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| question | measured | ours | peer | ratio |", "|---|---|---|---|---|"]
    for question, name, key in TEN:
        row = find_row(results, name, key)
        lines.append(f"| {question} | {row['what']} | {_ours(row)} | {_peer(row)} | {_number(row['ratio'])} |")
    return "\n".join(lines)


def _line(result: dict[str, Any], row: dict[str, Any]) -> str:
    cells = [
        *(row["what"], _ours(row), _peer(row), _number(row["ratio"]), _number(row["target"])),
        f"{_number(row['cpu_ms'])} ms" if row["cpu_ms"] is not None else "",
        *(_number(result["load"]), result["date"], f"`{result['script']}`" if result["script"] else ""),
    ]
    return f"| {' | '.join(cells)} |"


def _ours(row: dict[str, Any]) -> str:
    return f"{_number(row['ours'])} {row['unit']}".strip() if row["ours"] is not None else ""


def _peer(row: dict[str, Any]) -> str:
    if row["peer"] is None:
        return ""
    return f"{_number(row['peer'])} ({row['peer_name']})"


def _number(value: float | str | None) -> str:
    """A figure with separators between thousands; texts as they are, nothing for None."""
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:,}"


def _runs(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| result | command | machine | versions |", "|---|---|---|---|"]
    for name, result in results.items():
        has = result["machine"]
        machine = f"{has['cores']} cores, {has['cpu']}, {has['memory_gib']} GiB"
        versions = ", ".join(f"{library} {version}" for library, version in result["versions"].items() if version)
        command = f"`{result['command']}`" if result["command"] else ""
        moved = " (transferred)" if "transferred" in result else ""
        lines.append(f"| [{name}](benchmarks/{name}.json){moved} | {command} | {machine} | {versions} |")
    return "\n".join(lines)
