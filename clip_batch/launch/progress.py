"""Progress of an embed run: a bar on a terminal, a line every few seconds elsewhere, on stderr."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

Counts = tuple[int, int, int, int]
"""Partitions to do and done, images embedded, samples failed; so far, in this run."""

_PLAIN_SECONDS = 10.0


def line(counts: Counts, seconds: float) -> str:
    """One line of figures; the ETA takes partitions to be alike."""
    partitions, done, images, failed = counts
    rate = images / seconds if seconds > 0 else 0.0
    left = seconds * (partitions - done) / done if done else None
    eta = "?" if left is None else f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
    return f"{done}/{partitions} partitions, {images:,} images, {failed:,} failed, {rate:,.1f} images/s, ETA {eta}"


@contextlib.contextmanager
def shown(read: Callable[[], Counts], label: str = "embed") -> Iterator[None]:
    """Show what `read` returns until the block ends, then its last state."""
    started = time.monotonic()
    stop = threading.Event()
    draw = _bar if sys.stderr.isatty() else _lines
    thread = threading.Thread(target=draw, args=(read, label, started, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _lines(read: Callable[[], Counts], label: str, started: float, stop: threading.Event) -> None:
    while not stop.wait(_PLAIN_SECONDS):
        print(f"{label}: {line(read(), time.monotonic() - started)}", file=sys.stderr, flush=True)
    print(f"{label}: {line(read(), time.monotonic() - started)}", file=sys.stderr, flush=True)


def _bar(read: Callable[[], Counts], label: str, started: float, stop: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}")
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None, figures="")
        while True:
            ended = stop.wait(0.2)
            counts = read()
            figures = line(counts, time.monotonic() - started)
            bar.update(task, total=counts[0] or None, completed=counts[1], figures=figures)
            if ended:
                return
