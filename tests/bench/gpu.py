"""Measures what a GPU gives, part by part: its ceilings, the model, files to files, decoding, fp8, and the peers.

    bash tests/bench/gpu.sh OUT [--only device model ...] [--minutes 8.5] [--budget model=60 ...] [--device cuda]
        [--model ViT-L-14 ViT-B-32] [--precision bf16] [--quick] [--record]

Each part (see tests/bench/gpu_parts) is a process of its own that is killed at the end of its budget, and keeps what
it has measured until then; the others go on. OUT/gpu.json gets everything, in the form of docs/benchmarks/*.json, and
OUT/parts.log what the parts print. Weights are random; `demo` is the small model in the package. All of it runs on a
CPU as well: `--device cpu --model demo --quick`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.bench import result
from tests.bench.gpu_parts import BUDGETS, Options, Tried

WIDTH = 58
"""Characters of the table's first column."""


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--out", required=True, metavar="OUT", help="folder of the results")
    parser.add_argument("--only", nargs="+", default=list(BUDGETS), choices=list(BUDGETS), help="parts to run")
    parser.add_argument("--minutes", type=float, default=8.5, help="of the whole run; later parts are left out")
    parser.add_argument("--budget", nargs="+", default=[], metavar="PART=SECONDS", help="another budget of a part")
    parser.add_argument("--model", nargs="+", default=["ViT-L-14", "ViT-B-32"])
    parser.add_argument("--precision", default="", help="bf16 on CUDA, fp32 elsewhere")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    options = parser.parse_args()
    options.precision = options.precision or ("bf16" if options.device.startswith("cuda") else "fp32")
    budgets = BUDGETS | {part: float(seconds) for part, seconds in (each.split("=") for each in options.budget)}
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes
    tried: dict[str, Tried] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, (out / "parts.log").open("wb") as log:
        for part in options.only:
            seconds = min(budgets[part], ends - time.monotonic())
            if seconds < min(5, budgets[part]):
                tried[part] = Tried(error="left out, because the time is up")
            else:
                model, precision = options.model, options.precision
                asked = Options(part, home, options.device, model, precision, options.quick, seconds)
                tried[part] = run(asked, log)
            print(f"{part}: {tried[part].error or 'done'} ({tried[part].seconds:.0f} s)")
            save(out / "gpu.json", options, tried)
    rows, figures = gathered(tried)
    result.report("gpu", "encoders", options, rows, figures)
    lines = "\n".join(table(tried))
    (out / "table.txt").write_text(f"{lines}\n")
    print(lines)


def run(asked: Options, log: Any) -> Tried:
    """One part, in a process group that is killed at the end of its budget."""
    log.write(f"\n===== {asked.part}\n".encode())
    log.flush()
    started = time.monotonic()
    command = [sys.executable, "-m", "tests.bench.gpu_parts", json.dumps(asdict(asked))]
    compiled = {"TORCHINDUCTOR_CACHE_DIR": f"{asked.home}/compiled"}  # what one part compiles, others need not
    process = subprocess.Popen(
        command, cwd=ROOT, env=compiled | os.environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(asked.seconds)
        error = f"ended with code {code}, see parts.log" if code else ""
    except subprocess.TimeoutExpired:
        error = f"stopped after its {asked.seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver
            process.wait(10)
    tried = Tried.load(asked.results)
    tried.error, tried.seconds = tried.error or error, round(time.monotonic() - started, 1)
    return tried


def gathered(tried: dict[str, Tried]) -> tuple[list[result.Row], dict[str, Any]]:
    """The rows of all parts, and their figures by part."""
    rows = [result.Row(**row) for each in tried.values() for row in each.rows]
    return rows, {"parts": {part: asdict(each) | {"rows": len(each.rows)} for part, each in tried.items()}}


def save(path: Path, options: argparse.Namespace, tried: dict[str, Tried]) -> None:
    """Write all that is known so far, as a result of docs/benchmarks."""
    rows, figures = gathered(tried)
    written = path.with_suffix(".part")
    written.write_text(json.dumps(result.describe("gpu", "encoders", options, rows, figures), indent=1, default=str))
    written.replace(path)


def table(tried: dict[str, Tried]) -> list[str]:
    """The rows of each part as lines of text, and what a part could not do."""
    lines = []
    for part, each in tried.items():
        lines.append(f"{part} ({each.seconds:.0f} s){f': {each.error}' if each.error else ''}")
        for row in each.rows:
            ratio = f" = {row['ratio']} x {row['peer_name']}" if row["ratio"] is not None else ""
            lines.append(f"  {row['what'][:WIDTH]:{WIDTH}} {number(row['ours']):>9} {row['unit']}{ratio}")
        lines += [f"  - {note[:150]}" for note in each.notes]
    return lines


def number(value: Any) -> str:
    """A figure with as many digits as say something."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


if __name__ == "__main__":
    main()
