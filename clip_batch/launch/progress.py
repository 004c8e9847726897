"""Progress of an embed run on stderr: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from clip_batch.storage.store import Store
from clip_batch.types import counted

BAR_SECONDS = 0.2
"""Seconds between two updates of a bar."""

LINE_SECONDS = 10.0
"""Seconds between two lines."""

REMOTE_SECONDS = 5.0
"""Seconds between two updates that list a remote store: S3 answers, and bills, a request for every 1,000 commits."""


class Counts(NamedTuple):
    """Partitions to do and done, images embedded and samples failed, so far in this run."""

    partitions: int
    done: int
    images: int
    failed: int


def poll_seconds(store: Store) -> float:
    """Seconds between two updates for which a store is listed."""
    return BAR_SECONDS if store.local else REMOTE_SECONDS


def line(counts: Counts, seconds: float) -> str:
    """One line about a run after `seconds`; what is left assumes that partitions take equally long."""
    partitions, done, images, failed = counts
    rate = images / seconds if seconds > 0 else 0.0
    left = seconds * (partitions - done) / done if 0 < done < partitions else None
    text = (
        f"{done:,} of {counted(partitions, 'partition')} done, {counted(images, 'sample')} embedded, {failed:,} failed"
    )
    return f"{text}, {rate:,.1f} a second" + ("" if left is None else f", about {_duration(left)} left")


def _duration(seconds: float) -> str:
    """Seconds in the largest unit that they fill twice.

    >>> _duration(30), _duration(119), _duration(7300)
    ('30 seconds', '119 seconds', '2 hours')
    """
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


@contextlib.contextmanager
def show_progress(read: Callable[[], Counts], poll: float = BAR_SECONDS, label: str = "embed") -> Iterator[None]:
    """Show what `read` returns while the block runs, every `poll` seconds at most, and once more when it ends."""
    started = time.monotonic()
    stop = threading.Event()
    draw = _draw_bar if sys.stderr.isatty() else _print_lines
    thread = threading.Thread(target=draw, args=(read, label, started, poll, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _print_lines(read: Callable[[], Counts], label: str, started: float, poll: float, stop: threading.Event) -> None:
    ended = False
    while not ended:
        ended = stop.wait(max(poll, LINE_SECONDS))
        print(f"{label}: {line(read(), time.monotonic() - started)}", file=sys.stderr, flush=True)


def _draw_bar(read: Callable[[], Counts], label: str, started: float, poll: float, stop: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}")
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None, figures="")
        ended = False
        while not ended:
            ended = stop.wait(poll)
            counts = read()
            figures = line(counts, time.monotonic() - started)
            bar.update(task, total=counts.partitions or None, completed=counts.done, figures=figures)
