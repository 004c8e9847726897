"""Times README's way for one's own pictures on an empty machine, from `git clone` to the first search, step by step.

    python -m tests.bench.first_run [--pictures 1911] [--model demo] [--python python3] [--record]

The pictures are the demo's, as files in a folder. The clone is of this checkout, and packages come from wherever pip
finds them: how long they take to arrive is the network's affair. `--model demo` is the model in the package; another
one is fetched first, which counts in `run`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from clip_batch.demo import data
from tests import ROOT
from tests.bench import process, result

LIMIT = 3600
"""Seconds after which a step is given up."""


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--pictures", type=int, default=1911)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--python", default="python3", help="the interpreter that makes the environment")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_pictures(home / "Pictures", options.pictures)
        steps = {name: step(name, command, home) for name, command in commands(home, options.python, options.model)}
    whole = sum(one["seconds"] for one in steps.values())
    rows = [
        result.Row(name, f"{name}: {100 * one['seconds'] / whole:.0f} % of the whole", "s", one["seconds"])
        for name, one in steps.items()
    ]
    what = f"from git clone to the first search of {options.pictures:,} pictures, {options.model}"
    result.report("first_run", "repository", options, [result.Row("whole", what, "s", round(whole, 1)), *rows], steps)


def commands(home: Path, python: str, model: str) -> list[tuple[str, list[str]]]:
    """The steps, by name."""
    command = str(home / "env/bin/clip-batch")
    constraints = str(home / "clip-batch/constraints.txt")
    install = [str(home / "env/bin/python"), "-m", "pip", "install", "--quiet", "--constraint", constraints]
    run = [command, "run", str(home / "Pictures"), "--output", str(home / "out"), "--model", model, "--no-serve"]
    search = [command, "search", "--index", str(home / "out/index"), "--text", "a red apple", "--json"]
    return [
        ("git clone", ["git", "clone", "--quiet", str(ROOT), str(home / "clip-batch")]),
        ("python -m venv", [python, "-m", "venv", str(home / "env")]),
        ("pip install", [*install, f"{home / 'clip-batch'}[embed,merge,serve]"]),
        ("clip-batch run", run),
        ("clip-batch search", search),
    ]


def step(name: str, command: list[str], home: Path) -> dict[str, float]:
    """Run one step, which must succeed."""
    log = home / "log"
    measured = process.run(command, log, LIMIT)
    assert measured["exit"] == 0, f"{name}: {log.read_text(errors='replace')[-2000:]}"
    print(f"{name}: {json.dumps(measured)}", file=sys.stderr)
    return {key: measured[key] for key in ("seconds", "cpu_seconds", "peak_mb")}


def write_pictures(folder: Path, count: int) -> None:
    """Write the demo's pictures as files, again and again if more are asked for."""
    images = data.load()["image"].to_pylist()
    for number in range(count):
        path = folder / f"{number // 500:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images[number % len(images)])


if __name__ == "__main__":
    main()
