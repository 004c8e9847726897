"""Launching on this machine: one worker in this process, or several worker processes, such as one for each GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from clip_batch.config import EmbedConfig, StorageConfig
from clip_batch.config.options import to_environment
from clip_batch.embeddings.commits import committed, read_commit
from clip_batch.embeddings.embed import Outcome, embed
from clip_batch.embeddings.renewal import Renewal
from clip_batch.embeddings.slots import Slot, partitions
from clip_batch.embeddings.workers import WorkerRun
from clip_batch.encoders.device import cores, gpus
from clip_batch.launch.progress import Counts, poll_seconds, show_progress
from clip_batch.plan.plan import load_plan
from clip_batch.storage.store import Store
from clip_batch.types import Commit


def processes(workers: int, config: EmbedConfig) -> int:
    """Processes that embed on this machine: `workers`, or where that is 0 one for each GPU (0: there is none).

    Looking for GPUs loads torch, which takes seconds.
    """
    return workers or (gpus() if config.device in ("auto", "cuda") else 0)


def run_worker(
    output: str,
    work: list[int] | Slot | None,
    config: EmbedConfig,
    storage: StorageConfig,
    renew: Mapping[int, Renewal] | None = None,
) -> list[Outcome]:
    """Run one worker in this process, with progress, and return the outcome of each partition.

    `work` is the partitions to embed: their numbers, those of a slot, or (None) all; `renew` those that are committed
    and are embedded again. SIGTERM, SIGUSR1 and Ctrl-C stop
    the worker in good order: it raises Preempted.
    """
    run = WorkerRun(job(), work if isinstance(work, Slot) else None)
    numbers = partitions(Store(output, storage.storage_options), work) if isinstance(work, Slot) else work

    def read() -> Counts:
        return Counts(run.total, run.partitions, run.samples, run.failed)

    with _stopped_by_signals(run.stop), show_progress(read) if config.progress else contextlib.nullcontext():
        return embed(output, config, numbers, storage=storage, run=run, renew=renew)


def job() -> str:
    """The scheduler's name for this process's job, such as "slurm 7_3"; "" without a scheduler."""
    environ = os.environ
    if "SLURM_JOB_ID" not in environ:
        return ""
    array = f"{environ.get('SLURM_ARRAY_JOB_ID')}_{environ.get('SLURM_ARRAY_TASK_ID')}"
    return f"slurm {array if 'SLURM_ARRAY_JOB_ID' in environ else environ['SLURM_JOB_ID']}"


def run_workers(output: str, workers: int, config: EmbedConfig, storage: StorageConfig) -> int:
    """Run `workers` processes, one for each of as many slots, and return the worst of their exit codes.

    Their errors go to this process's stderr.
    """
    store = Store(output, storage.storage_options)
    plan = load_plan(store)
    planned = set(range(len(plan.partitions)))
    before = committed(store) & planned
    commits: dict[int, Commit] = {}
    cuda = config.device.startswith("cuda") or (config.device == "auto" and gpus() > 0)
    threads = config.threads or max(1, cores() // workers)

    def start(slot: int) -> subprocess.Popen[bytes]:
        device = f"cuda:{slot % max(gpus(), 1)}" if cuda else config.device
        worker_config = dataclasses.replace(config, threads=threads, device=device, progress=False)
        command = [sys.executable, "-m", "clip_batch", "worker", "--output", output]
        command += ["--slot", str(slot), "--slots", str(workers)]
        return subprocess.Popen(command, env=environment(worker_config, storage), stdout=subprocess.DEVNULL)

    total = len(plan.partitions) - len(before)

    def read() -> Counts:
        for number in (committed(store) & planned) - before - set(commits):
            commits[number] = read_commit(store, plan.name(number))
        failed = sum(sum(commit.failed.values()) for commit in commits.values())
        return Counts(total, len(commits), sum(commit.rows for commit in commits.values()), failed)

    display = show_progress(read, poll_seconds(store)) if config.progress else contextlib.nullcontext()
    processes = [start(slot) for slot in range(workers)]
    stop = threading.Event()
    with _stopped_by_signals(stop), display:
        while any(process.poll() is None for process in processes) and not stop.wait(0.2):
            pass
        if stop.is_set():
            for process in processes:
                process.terminate()
        for process in processes:
            process.wait()
    # A worker that has no handler for SIGTERM yet, or no longer, is killed by it.
    codes = [75 if process.returncode == -signal.SIGTERM else process.returncode for process in processes]
    return next((code for code in (2, 1, 75) if code in codes), 0 if not any(codes) else 1)


def environment(config: EmbedConfig, storage: StorageConfig) -> dict[str, str]:
    """The environment of a worker: this process's, and the options, which may contain credentials."""
    return {**os.environ, **to_environment(config, storage)}


@contextlib.contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Let SIGTERM, SIGUSR1 and Ctrl-C set `stop` while the block runs; a second Ctrl-C raises KeyboardInterrupt."""

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
