"""Clocks: what a block on the device takes, how many a second a function does, how busy the GPU is."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


def median_seconds(work: Callable[[], object], device: str, seconds: float = 1.0, least: int = 5) -> float:
    """Median seconds of one call, after two that do not count; on a GPU by its own clock."""
    for _ in range(2):
        work()
    taken: list[float] = []
    started = time.perf_counter()
    while len(taken) < least or time.perf_counter() - started < seconds:
        if device.startswith("cuda"):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1000)
        else:
            begun = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def rate(work: Callable[[], int], seconds: float, threads: int = 1) -> float:
    """How many a second `threads` threads do that each call `work`, which returns how many it did.

    One thread gives the median of its calls; several give all that they did over the time. The first two calls of
    each do not count.
    """
    work()
    work()
    if threads == 1:
        paces = []
        started = time.perf_counter()
        while len(paces) < 3 or time.perf_counter() - started < seconds:
            begun = time.perf_counter()
            done = work()
            paces.append(done / (time.perf_counter() - begun))
        return statistics.median(paces)
    counts, spent = [0] * threads, [0.0] * threads
    errors: list[Exception] = []
    ready = threading.Barrier(threads)

    def loop(number: int) -> None:
        try:
            work()
            ready.wait(60)
            started = time.perf_counter()
            while (passed := time.perf_counter() - started) < seconds:
                counts[number] += work()
            spent[number] = passed
        except Exception as error:
            errors.append(error)
            ready.abort()

    workers = [threading.Thread(target=loop, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return sum(counts) / max(spent)


INTERVAL = 0.2
"""Seconds between two looks at the GPU."""


@contextlib.contextmanager
def watched(cuda: bool) -> Iterator[Callable[[float], dict[str, float]]]:
    """A function that gives medians of the GPU's state since so many seconds after the block began; nothing on a CPU.

    busy: percent of the time that a kernel ran; mhz, watts, and memory in MiB likewise.
    """
    if not cuda:
        yield lambda after: {}
        return
    fields = {"busy": "utilization.gpu", "mhz": "clocks.sm", "watts": "power.draw", "mib": "memory.used"}
    query = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"]
    with tempfile.TemporaryFile("w+") as seen:
        started = time.perf_counter()
        process: subprocess.Popen[Any] = subprocess.Popen([*query, "-lms", f"{1000 * INTERVAL:.0f}"], stdout=seen)

        def medians(after: float) -> dict[str, float]:
            spent = time.perf_counter() - started
            seen.seek(0)
            rows = [line.split(",") for line in seen.read().splitlines()]
            whole = [[float(cell) for cell in row] for row in rows if len(row) == len(fields) and "N/A" not in str(row)]
            kept = whole[int(len(whole) * min(after / spent, 0.9)) :]
            return {name: statistics.median(row[k] for row in kept) for k, name in enumerate(fields)} if kept else {}

        try:
            yield medians
        finally:
            process.kill()
            process.wait()
