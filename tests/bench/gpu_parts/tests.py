"""The tests that need CUDA: `pytest -m cuda`."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

from tests import ROOT
from tests.bench.gpu_parts import Part


def run(part: Part) -> None:
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    if not files:
        part.note("no test is marked cuda")
        return
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "cuda",
        "-v",
        "-rA",
        "--show-capture=stdout",
        "--timeout=45",
        "-p",
        "no:cacheprovider",
        "--tb=short",
    ]
    command += ["-W", "default", *files]  # the warnings of other versions of libraries are none of ours
    with open(f"{part.options.home}/tests.log", "w+", errors="replace") as log:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=part.left).returncode
        except subprocess.TimeoutExpired:
            code = -1
            part.note("stopped, because their time was up")
        log.seek(0)
        output = log.read()
    print(output)
    counts = Counter(re.findall(r" (PASSED|FAILED|ERROR|SKIPPED)\b.*\[ *\d+%\]$", output, re.MULTILINE))
    for name in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
        part.row(name.lower(), f"tests marked cuda: {name.lower()}", "", counts[name])
    part.figure("exit", code)
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE)
    for line in failed[:8]:
        part.note(line)
