"""SLURM: what is missing as job arrays through submitit, and a merge chain behind them.

A task runs the same commands as a person: `clip-batch worker --submission ID --slot I`, and
`clip-batch merge --task ...`. submitit writes the sbatch script and the pickle that names the
command, and requeues a warned task; nothing asks sacct.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clip_batch.config import SlurmConfig
from clip_batch.errors import ConfigError, Preempted, one_line

Main = Callable[[Sequence[str]], int]
"""The command line: arguments to exit code."""

Say = Callable[[str], None]

EMBED = "clip-batch-embed"
"""How the names of embed jobs begin."""

_EARLY = """trap 'case $? in 140 | 143)
  me=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  me=${me:-$SLURM_JOB_ID}
  [ "$(squeue --noheader --jobs "$me" --format %T)" = RUNNING ] && scontrol requeue "$me"
esac' EXIT"""
"""Shell lines before a task: one that SIGUSR2 or SIGTERM killed before `Task` listened is requeued too."""

POLL = 5.0
"""Seconds between two looks at the queue."""


@dataclass(frozen=True)
class SlurmStep:
    """One command of a chain, run once, or (`slots` given) by as many workers, each with its `--slot`.

    `workers` processes share a task. `after` says how the work before must have ended.
    """

    name: str
    command: list[str]
    slots: int = 0
    workers: int = 1
    after: str = ""

    @property
    def tasks(self) -> int:
        return -(-self.slots // self.workers)


class Task:
    """What submitit pickles: a clip-batch command, and how it meets signals.

    The warning (SIGUSR2, `grace` seconds before the end) and SIGTERM (preemption, scancel) stop the
    command, which exits with 75; if SLURM still counts the task as running, so that nobody cancelled
    it, it is requeued, this array task alone.
    """

    def __init__(self, main: Main) -> None:
        self.main = main

    def __call__(self, command: list[str], slot: int | None) -> None:
        """Run the command; leaves with its exit code. A job's processes take slots from `slot` on."""
        checkpoint = signal.getsignal(signal.SIGUSR2)  # submitit's
        signal.signal(signal.SIGUSR2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.signal(signal.SIGTERM, _on_term)
        rank = int(os.environ.get("SLURM_PROCID", "0"))
        try:
            code = self.main(command if slot is None else [*command, "--slot", str(slot + rank)])
        except Preempted:
            code = Preempted.exit_code
        if code == Preempted.exit_code:
            _requeue(checkpoint, rank)
        raise SystemExit(code)

    def checkpoint(self, command: list[str], slot: int | None) -> Any:
        """What submitit runs after a requeue: the same again; commits tell what is left."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, command, slot)


def _on_term(*_: Any) -> None:
    raise Preempted()


def _requeue(checkpoint: Any, rank: int) -> None:
    """Requeue this task if it runs: the first process through submitit, which counts timeouts, others alone."""
    from submitit import JobEnvironment

    for number in (signal.SIGUSR2, signal.SIGTERM):  # requeueing brings a SIGTERM of its own
        signal.signal(number, signal.SIG_IGN)
    job = JobEnvironment().job_id
    try:
        state = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
        if subprocess.run(state, capture_output=True, text=True).stdout.strip() != "RUNNING":
            return
        if rank == 0 and callable(checkpoint):
            checkpoint(signal.SIGUSR2, None)
        subprocess.run(["scontrol", "requeue", job], check=False)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"cannot requeue {job}: {error}; run clip-batch submit again", file=sys.stderr)


def chain(worker: list[str], slots: int, workers: int, merge: list[str], merge_tasks: int, id: str) -> list[SlurmStep]:
    """The works of a submission, in order: embed (none where nothing is missing), then the merge's three kinds.

    A merge waits for the end of embed, however it ends, and refuses by itself where OUT is incomplete.
    """
    works = [SlurmStep(f"{EMBED}-{id}", worker, slots, workers)] if slots else []
    if merge:
        shards = [*merge, "--task", "shards", "--slots", str(merge_tasks)]
        works += [
            SlurmStep(f"clip-batch-train-{id}", [*merge, "--task", "train"], after="afterany" if slots else ""),
            SlurmStep(f"clip-batch-shards-{id}", shards, merge_tasks, after="afterok"),
            SlurmStep(f"clip-batch-manifest-{id}", [*merge, "--task", "manifest"], after="afterok"),
        ]
    return works


def scripts(works: Sequence[SlurmStep], config: SlurmConfig, folder: Path) -> Iterator[str]:
    """The sbatch scripts that `submit` hands in; job ids that are not known yet read JOBID."""
    limit = _array_limit()
    before: list[str] = []
    for work in works:
        for first in range(0, work.tasks, limit) or [0]:
            executor = _executor(work, config, folder, before)
            if (count := min(limit, work.tasks - first)) > 1:  # as submitit does for arrays
                executor.parameters["map_count"] = count
            yield executor._make_submission_file_text(executor._submitit_command_str, "")
        before = ["JOBID"]


def submit(works: Sequence[SlurmStep], main: Main, config: SlurmConfig, folder: Path, say: Say) -> None:
    """Hand the works to sbatch; ConfigError says what it refused. Nothing waits here."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder.mkdir(parents=True, exist_ok=True)
    limit = _array_limit()
    before: list[str] = []
    for work in works:
        ids: list[str] = []
        slots: list[int | None] = [*range(0, work.slots, work.workers)] or [None]
        while slots:
            now, slots = slots[:limit], slots[limit:]
            executor = _executor(work, config, folder, before)
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats sbatch's, and raises with it
                    jobs = executor.map_array(Task(main), [work.command] * len(now), now)
            except (FailedJobError, FailedSubmissionError) as error:
                handed = f"; {' '.join(ids)} were handed in: scancel them, or let them run" if ids else ""
                raise ConfigError(f"sbatch refused {work.name}: {_reason(error)}{handed}") from None
            ids.append(jobs[0].job_id.partition("_")[0])
        behind = f", {work.after} {':'.join(before)}" if before else ""
        say(f"{work.name}: {max(work.tasks, 1)} tasks as job {', '.join(ids)}{behind}")
        before = ids


def _array_limit() -> int:
    """MaxArraySize: array indices must stay below it."""
    try:
        told = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"no SLURM answers here ({_reason(error)}): run submit slurm on a login node") from None
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", told, re.MULTILINE)
    return max(1, int(found[1])) if found else 1001


def _reason(error: Exception) -> str:
    """An error on one line, with what the command said where it said anything."""
    said = getattr(error, "stderr", "") or str(error)
    return one_line(said)[-300:]


def _executor(work: SlurmStep, config: SlurmConfig, folder: Path, before: list[str]) -> Any:
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise ConfigError("submit slurm needs submitit: pip install 'clip-batch[slurm]'") from None

    own = config if work.name.startswith(EMBED) else _merge_config(config)
    try:
        executor = SlurmExecutor(folder, max_num_timeout=config.timeouts, python=_python(own))
        executor.update_parameters(**_parameters(work, own, before))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"submitit: {_reason(error)}") from None
    return executor


def _merge_config(config: SlurmConfig) -> SlurmConfig:
    """The resources of a merge task: cores and memory, no GPU, one process."""
    return replace(
        config,
        slurm_partition=config.merge_partition or config.slurm_partition,
        time=config.merge_time,
        cpus_per_task=config.merge_cpus,
        memory=config.merge_memory,
        nodes=1,
        tasks_per_node=1,
        gpus_per_task=0,
        gres="",
        exclusive=False,
    )


def _parameters(work: SlurmStep, config: SlurmConfig, before: list[str]) -> dict[str, Any]:
    """submitit's parameters; what is empty is left to the cluster."""
    more: dict[str, Any] = {"requeue" if config.requeue else "no-requeue": True}
    if before:
        more["kill-on-invalid-dep"] = "yes"  # or a merge behind a failed task would pend for ever
    named = {
        "mail_user": config.mail_user,
        "mail_type": config.mail_type,
        "dependency": f"{work.after}:{':'.join(before)}" if before else "",
    }
    return {
        **_resources(config),
        "job_name": work.name,
        "time": config.time,
        "nodes": config.nodes,
        "ntasks_per_node": config.tasks_per_node,
        "cpus_per_task": config.cpus_per_task,
        "signal_delay_s": config.grace,
        "array_parallelism": config.concurrency,
        "stderr_to_stdout": True,
        "wckey": None,
        "setup": [_EARLY, "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}", *config.setup],
        "srun_args": ["--kill-on-bad-exit=0", f"--cpus-per-task={config.cpus_per_task}", *_pyxis(config)],
        "additional_parameters": {**more, **config.sbatch},
        **{name: value for name, value in named.items() if value},
    }


def _resources(config: SlurmConfig) -> dict[str, Any]:
    """Where and with what a task runs, by sbatch's and srun's names; what is empty is left out."""
    named = {
        "partition": config.slurm_partition,
        "account": config.account,
        "qos": config.qos,
        "gpus_per_task": config.gpus_per_task,
        "gres": config.gres,
        "mem": config.memory.removesuffix("B"),
        "exclusive": config.exclusive,
        "constraint": config.constraint,
        "nodelist": config.nodelist,
        "exclude": config.exclude,
        "comment": config.comment,
    }
    return {name: value for name, value in named.items() if value}


def _pyxis(config: SlurmConfig) -> list[str]:
    if config.container != "pyxis":
        return []
    mounts = [f"--container-mounts={config.container_mounts}"] if config.container_mounts else []
    return [f"--container-image={config.container_image}", *mounts]


def _python(config: SlurmConfig) -> str | None:
    """The command that starts Python in a task; None: this interpreter."""
    if config.container == "apptainer":
        mounts = [f"--bind {mount}" for mount in config.container_mounts.split(",") if mount]
        gpu = ["--nv"] if config.gpus_per_task or config.gres else []
        return " ".join(["apptainer exec", *gpu, *mounts, config.container_image, config.container_python])
    return config.container_python if config.container else None


def on_node(config: SlurmConfig, command: list[str]) -> list[str]:
    """The words that run a clip-batch command on one node, with the resources of a worker."""
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in _resources(config).items()
    ]
    size = ["--nodes=1", "--ntasks=1", f"--cpus-per-task={config.cpus_per_task}", "--job-name=clip-batch-doctor"]
    python = _python(config) or shlex.quote(sys.executable)
    return ["srun", *size, *flags, *_pyxis(config), *shlex.split(python), "-m", "clip_batch", *command]


def wait(works: Sequence[SlurmStep], look: Callable[[], str], say: Say) -> None:
    """Until the queue has none of the works; `look` tells of progress, and changes are said."""
    names = ",".join(work.name for work in works)
    said = ""
    while True:
        queue = subprocess.run(["squeue", "--noheader", f"--name={names}"], capture_output=True, text=True)
        if queue.returncode == 0 and not queue.stdout.strip():
            return
        if (now := look()) != said:
            say(now)
            said = now
        time.sleep(POLL)
