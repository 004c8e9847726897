"""This machine: one worker here, or one process a GPU, over everything that is not committed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from clip_batch.config import EmbedConfig, StorageConfig
from clip_batch.config.options import to_environment
from clip_batch.embeddings.commits import committed, read_commit
from clip_batch.embeddings.embed import Outcome, embed
from clip_batch.embeddings.slots import Slot, partitions
from clip_batch.embeddings.workers import WorkerRun
from clip_batch.encoders.device import cores, gpus
from clip_batch.launch.progress import Counts, shown
from clip_batch.plan.plan import load_plan
from clip_batch.storage.store import Store
from clip_batch.types import Commit


def run_worker(
    output: str, work: list[int] | Slot | None, config: EmbedConfig, storage: StorageConfig
) -> list[Outcome]:
    """One worker in this process, with progress; SIGTERM, SIGUSR1 and Ctrl-C stop it cleanly (Preempted).

    Its partitions are those given, those of a slot, or (None) all.
    """
    run = WorkerRun(job(), work if isinstance(work, Slot) else None)
    numbers = partitions(Store(output, storage.storage_options), work) if isinstance(work, Slot) else work

    def read() -> Counts:
        return run.total, run.partitions, run.samples, run.failed

    with _stopping(run.stop), shown(read) if config.progress else contextlib.nullcontext():
        return embed(output, config, numbers, storage=storage, run=run)


def job() -> str:
    """The scheduler's name of this process's job; empty where it has none."""
    environ = os.environ
    if "SLURM_JOB_ID" not in environ:
        return ""
    array = f"{environ.get('SLURM_ARRAY_JOB_ID')}_{environ.get('SLURM_ARRAY_TASK_ID')}"
    return f"slurm {array if 'SLURM_ARRAY_JOB_ID' in environ else environ['SLURM_JOB_ID']}"


def run_workers(output: str, workers: int, config: EmbedConfig, storage: StorageConfig) -> int:
    """`workers` processes, each a slot of as many; returns the worst exit code. Their errors go to our stderr."""
    store = Store(output, storage.storage_options)
    plan = load_plan(store)
    before = committed(store)
    commits: dict[int, Commit] = {}
    cuda = config.device.startswith("cuda") or (config.device == "auto" and gpus() > 0)
    threads = config.threads or max(1, cores() // workers)

    def start(slot: int) -> subprocess.Popen[bytes]:
        device = f"cuda:{slot % max(gpus(), 1)}" if cuda else config.device
        own = dataclasses.replace(config, threads=threads, device=device, progress=False)
        command = [sys.executable, "-m", "clip_batch", "worker", "--output", output]
        command += ["--slot", str(slot), "--slots", str(workers)]
        return subprocess.Popen(command, env=environment(own, storage), stdout=subprocess.DEVNULL)

    total = len(plan.partitions) - len(before)

    def read() -> Counts:
        for number in committed(store) - before - set(commits):
            commits[number] = read_commit(store, plan.name(number))
        failed = sum(sum(commit.failed.values()) for commit in commits.values())
        return total, len(commits), sum(commit.rows for commit in commits.values()), failed

    display = shown(read) if config.progress else contextlib.nullcontext()
    processes = [start(slot) for slot in range(workers)]
    stop = threading.Event()
    with _stopping(stop), display:
        while any(process.poll() is None for process in processes) and not stop.wait(0.2):
            pass
        if stop.is_set():
            for process in processes:
                process.terminate()
        for process in processes:
            process.wait()
    # A worker that had just ended its own work when it was told to stop dies of the signal itself.
    codes = [75 if process.returncode == -signal.SIGTERM else process.returncode for process in processes]
    return next((code for code in (2, 1, 75) if code in codes), 0 if not any(codes) else 1)


def environment(config: EmbedConfig, storage: StorageConfig) -> dict[str, str]:
    """A worker's environment: ours, with the options, credentials among them."""
    return {**os.environ, **to_environment(config, storage)}


@contextlib.contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """Let signals set `stop` while the block runs; a second Ctrl-C ends at once."""

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
