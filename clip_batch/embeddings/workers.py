"""What each worker is at and has done: OUT/_clip_batch/workers/<id>.json, for `status` to read.

A record is a cache and a sign of life, rewritten every `BEAT` seconds. No decision rests on it, nor
on the clock it carries: commits are the truth, and a record that is lost costs only reading them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from clip_batch.plan import paths
from clip_batch.storage.store import Store
from clip_batch.types import Commit

BEAT = 20.0
"""Seconds between two writes of a record; less at the start of a run."""

SILENT = 3 * BEAT
"""Seconds without a write after which a worker is taken for dead."""


@dataclass
class WorkerRun:
    """One process's run of `embed`, shared with its launcher: who started it, its counters, its stop signal.

    `slot` (see `slots.Slot`) is where its partitions come from, if from a slot. `tell` asks for a record now.
    """

    job: str = ""
    slot: tuple[int, int, str] | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    total: int = 0
    partitions: int = 0
    samples: int = 0
    failed: int = 0
    running: set[int] = field(default_factory=set)
    committed: list[Commit] = field(default_factory=list)
    tell: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class WorkerRecord:
    """A worker as its file tells: `committed` maps partitions to the counts of their commits.

    `started` and `beat` are Unix seconds; `ended` tells that the worker left by itself.
    """

    worker: str
    job: str
    gpus: int
    started: float
    beat: float
    ended: bool
    samples: int
    running: list[int]
    committed: dict[str, dict[str, Any]]
    slot: tuple[int, int, str] | None = None

    @property
    def alive(self) -> bool:
        return not self.ended and time.time() - self.beat < SILENT


@contextlib.contextmanager
def recorded(store: Store, run: WorkerRun, gpus: int) -> Iterator[None]:
    """Keep a record of the run while the block runs, and its last state."""
    name = paths.worker(f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
    worker = f"{socket.gethostname()}:{os.getpid()}"
    started = time.time()
    stop = threading.Event()

    def write() -> None:
        counts = {
            str(commit.partition): {key: getattr(commit, key) for key in _COUNTS} for commit in list(run.committed)
        }
        running = sorted(run.running.copy())
        now, ended = time.time(), stop.is_set()
        record = WorkerRecord(worker, run.job, gpus, started, now, ended, run.samples, running, counts, run.slot)
        with contextlib.suppress(Exception):  # a worker must not fail for want of a report
            store.replace(name, json.dumps(vars(record)).encode())

    def beat() -> None:
        pause = 0.5
        while not stop.is_set():
            if not run.tell.wait(pause):
                pause = min(2 * pause, BEAT)
            run.tell.clear()
            write()

    thread = threading.Thread(target=beat, daemon=True, name="record")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        run.tell.set()
        thread.join()
        run.running.clear()
        write()


_COUNTS = ("rows", "failed", "warnings", "started", "finished")


def read_records(store: Store) -> list[WorkerRecord]:
    """The records of all workers."""
    names = [f"{paths.WORKERS}/{name}" for name in store.list(paths.WORKERS) if not name.startswith(".")]
    return [WorkerRecord(**json.loads(data)) for data in store.read_all(names)]


def forget(store: Store) -> None:
    """Remove all records, where commits they count are to be retired."""
    for name in store.list(paths.WORKERS):
        store.remove(f"{paths.WORKERS}/{name}")
