"""What each worker is doing and has done: OUT/_clip_batch/workers/<id>.json, for `status` and `spare` to read.

A worker rewrites its record every `BEAT` seconds. Nothing is committed or skipped because of a record or its clock:
commits are the truth, and if a record is lost, `status` reads the commits that it counted.
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
from typing import Any, NotRequired, TypedDict

from clip_batch.embeddings.slots import Slot
from clip_batch.plan import paths
from clip_batch.plan.state import SILENT, is_alive, worker_records
from clip_batch.storage.store import Store
from clip_batch.types import Commit

BEAT = SILENT / 3
"""Seconds between two writes of a record; fewer at the start of a run."""


class CommitCounts(TypedDict):
    """The counts of a commit, as records repeat them: see `types.Commit`."""

    rows: int
    failed: dict[str, int]
    warnings: dict[str, int]
    started: float
    finished: float
    empty: NotRequired[str]


def counts_of(commit: Commit) -> CommitCounts:
    """The counts of a commit."""
    return CommitCounts(
        rows=commit.rows,
        failed=commit.failed,
        warnings=commit.warnings,
        started=commit.started,
        finished=commit.finished,
        empty=commit.empty,
    )


@dataclass
class WorkerRun:
    """One process's run of `embed`, shared with its launcher: who started it, its counters, its stop signal.

    `slot` is where its partitions come from, if they come from a slot. `total` and `partitions` count the partitions
    to do and done, `samples` and `failed` the samples embedded and failed. Setting `write_now` writes the record.
    """

    job: str = ""
    slot: Slot | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    total: int = 0
    partitions: int = 0
    samples: int = 0
    failed: int = 0
    running: set[int] = field(default_factory=set)
    committed: list[Commit] = field(default_factory=list)
    write_now: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class WorkerRecord:
    """A worker as its file describes it; `committed` has the counts of its commits by partition (as text, for JSON).

    `started` and `beat` (the last write) are Unix seconds; `ended` says that the worker exited in good order.
    """

    worker: str
    job: str
    gpus: int
    started: float
    beat: float
    ended: bool
    samples: int
    running: list[int]
    committed: dict[str, CommitCounts]
    slot: Slot | None = None

    @property
    def alive(self) -> bool:
        """Whether the worker has not ended and was heard of in the last `SILENT` seconds."""
        return is_alive(self.ended, self.beat)


@contextlib.contextmanager
def recorded(store: Store, run: WorkerRun, gpus: int) -> Iterator[None]:
    """Keep a record of the run while the block runs; its last state stays."""
    name = paths.worker(f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
    worker = f"{socket.gethostname()}:{os.getpid()}"
    started = time.time()
    stop = threading.Event()

    def write() -> None:
        counts = {str(commit.partition): counts_of(commit) for commit in list(run.committed)}
        running = sorted(run.running.copy())
        now, ended = time.time(), stop.is_set()
        record = WorkerRecord(worker, run.job, gpus, started, now, ended, run.samples, running, counts, run.slot)
        with contextlib.suppress(Exception):  # a record that cannot be written must not fail the worker
            store.replace(name, json.dumps(vars(record)).encode())

    def beat() -> None:
        pause = 0.5
        while not stop.is_set():
            if not run.write_now.wait(pause):
                pause = min(2 * pause, BEAT)
            run.write_now.clear()
            write()

    thread = threading.Thread(target=beat, daemon=True, name="record")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        run.write_now.set()
        thread.join()
        run.running.clear()
        write()


def read_records(store: Store) -> list[WorkerRecord]:
    """The records of all workers, those that have ended too."""
    return [_parse(fields) for fields in worker_records(store)]


def _parse(fields: dict[str, Any]) -> WorkerRecord:
    if fields.get("slot"):
        fields["slot"] = Slot(*fields["slot"])
    return WorkerRecord(**fields)


def remove_records(store: Store) -> None:
    """Remove all records, because commits that they count are about to be removed."""
    for name in store.list(paths.WORKERS):
        store.remove(f"{paths.WORKERS}/{name}")
