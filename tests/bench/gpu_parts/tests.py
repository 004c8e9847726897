"""The tests that need CUDA, in several processes; then those that want the GPU for themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter

from clip_batch.encoders.device import cores
from tests import ROOT
from tests.bench.gpu_parts import Part

MOST = 8
"""Processes at once: each takes seconds to start, and some gigabytes."""

ALONE = 20
"""Seconds that are kept for the tests that run alone."""

PYTEST = (
    "--dist=loadgroup -v -rA --show-capture=stdout --tb=short --durations=15 --timeout=60 "
    "-p no:cacheprovider -p no:benchmark -p tests.bench.gpu_parts.report"
)


def run(part: Part) -> None:
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    count = min(MOST, max(1, cores() // 2))
    outputs = []
    for marked, processes, kept in (("cuda and not alone", count, ALONE), ("cuda and alone", 1, 0)):
        code, output = pytest(part, files, marked, processes, max(part.left - kept, 1))
        print(output)
        part.figure(marked, code)
        outputs.append(output)
        if code < 0:
            part.note(f"{marked}: stopped, because their time was up")
    output = "\n".join(outputs)
    counts = Counter(re.findall(r"^\[gw\d+\] \[ *\d+%\] ([A-Z]+) ", output, re.MULTILINE))
    for name in sorted({"PASSED", "FAILED", "ERROR", "SKIPPED"} | set(counts)):
        part.row(name.lower(), f"tests marked cuda: {name.lower()}", "", counts[name])
    for line in re.findall(r"^failed: (.*)$", output, re.MULTILINE)[:8]:
        part.note(line)


def pytest(part: Part, files: list[str], marked: str, processes: int, seconds: float) -> tuple[int, str]:
    """Run tests by their marks in so many processes: pytest's exit code, -1 if it was stopped, and what it printed."""
    command = [sys.executable, "-m", "pytest", "-m", marked, f"-n{processes}", *PYTEST.split()]
    command += ["-W", "default", *files]  # the warnings of other versions of libraries are none of ours
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // processes))}
    with open(f"{part.options.home}/tests.log", "w+", errors="replace") as log:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=os.environ | threads, stdout=log, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
        log.seek(0)
        return code, log.read()
