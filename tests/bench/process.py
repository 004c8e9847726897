"""Runs a command in a process of its own and measures it: seconds, CPU seconds, peak memory."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PEAKS = ("VmHWM", "RssAnon")
"""Lines of /proc/PID/status: peak resident memory, and the anonymous part of what is resident now."""

EVERY = 0.01
"""Seconds between two looks at a process's memory."""


def run(
    command: Sequence[str], log: Path, limit: float, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a command, and kill it after `limit` seconds; its output goes to the file `log`.

    Returns its seconds, CPU seconds, exit code, whether it was killed, and the peaks of its resident and of its
    anonymous memory (MB), summed over its processes.
    """
    started, before = time.monotonic(), _cpu_of_children()
    peak = dict.fromkeys(PEAKS, 0)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env={**os.environ, **(environment or {})}
        )
        try:
            while process.poll() is None and time.monotonic() - started < limit:
                for name, value in memory(process.pid, PEAKS).items():
                    peak[name] = max(peak[name], value)
                time.sleep(EVERY)
            seconds, over = time.monotonic() - started, process.poll() is None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(_cpu_of_children() - before, 1),
        "over_limit": over,
        "exit": code,
        "peak_mb": peak["VmHWM"] // 1024,
        "peak_anonymous_mb": peak["RssAnon"] // 1024,
    }


def memory(pid: int | str, names: Sequence[str]) -> dict[str, int]:
    """Lines of /proc/PID/status in kB by name, summed over a process and those that it started."""
    total = dict.fromkeys(names, 0)
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        for name in total:
            if found := re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE):
                total[name] += int(found[1])
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                for name, value in memory(int(child), names).items():
                    total[name] += value
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended meanwhile
    return total


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
