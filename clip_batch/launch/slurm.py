"""SLURM: job arrays that embed what is missing, and the steps of a merge behind them, through submitit.

A task runs the commands that a person would: `clip-batch worker --submission ID --slot I`, and
`clip-batch merge --task ...`. submitit writes the sbatch script and the pickle that names the
command, and requeues a task before its time limit. sacct is not needed.
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
"""The start of the names of embed jobs."""

_REQUEUE_TRAP = """trap 'case $? in 140 | 143)
  me=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  me=${me:-$SLURM_JOB_ID}
  case "$(squeue --noheader --jobs "$me" --format %T)" in RUNNING | SIGNALING) scontrol requeue "$me" ;; esac
esac' EXIT"""
"""Shell lines before each task.

They requeue a task that SIGUSR2 (exit code 140) or SIGTERM (143) kills before `Task` handles these signals."""

_NOT_CANCELLED = frozenset(("RUNNING", "SIGNALING"))
"""What squeue shows of a running task; the second for a moment, while SLURM is sending it a signal."""

POLL = 5.0
"""Seconds between two requests to squeue."""


@dataclass(frozen=True)
class SlurmStep:
    """One step of a chain: a command that runs once or, where `slots` is given, in one worker for each `--slot`.

    A task runs `workers` of the workers. `after` is how the step before must have ended ("afterok", "afterany").
    """

    name: str
    command: list[str]
    slots: int = 0
    workers: int = 1
    after: str = ""

    @property
    def tasks(self) -> int:
        """The number of tasks of the workers; 0 for a command that runs once."""
        return -(-self.slots // self.workers)


class Task:
    """The function that submitit pickles: it runs a clip-batch command and handles signals.

    SIGUSR2 (SLURM's warning, `grace` seconds before the time limit) and SIGTERM (preemption, scancel) stop the
    command, which then exits with 75. If squeue still shows the task as running, nobody has cancelled it, and it is
    requeued: this task of the array alone.
    """

    def __init__(self, main: Main) -> None:
        self.main = main

    def __call__(self, command: list[str], slot: int | None) -> None:
        """Run the command and exit with its code. The processes of a task take the slots from `slot` on."""
        checkpoint = signal.getsignal(signal.SIGUSR2)  # the handler that submitit has installed
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
        """What submitit runs after a requeue: the same command, which skips what is committed."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, command, slot)


def _on_term(*_: Any) -> None:
    raise Preempted()


def _requeue(checkpoint: Any, rank: int) -> None:
    """Requeue this task if squeue shows it as running: its first process through submitit, which counts timeouts."""
    from submitit import JobEnvironment

    for number in (signal.SIGUSR2, signal.SIGTERM):  # a requeue sends SIGTERM itself
        signal.signal(number, signal.SIG_IGN)
    job = JobEnvironment().job_id
    try:
        state = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
        if subprocess.run(state, capture_output=True, text=True, check=True).stdout.strip() not in _NOT_CANCELLED:
            return
        if rank == 0 and callable(checkpoint):
            checkpoint(signal.SIGUSR2, None)
        subprocess.run(["scontrol", "requeue", job], check=False)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"cannot requeue {job}: {_reason(error)}; run clip-batch submit again", file=sys.stderr)


def chain(worker: list[str], slots: int, workers: int, merge: list[str], merge_tasks: int, id: str) -> list[SlurmStep]:
    """The steps of a submission, in order: embed (if anything is missing), then train, shards and manifest of merge.

    The merge starts when embed has ended, however it ended; it refuses by itself where OUT is incomplete.
    """
    steps = [SlurmStep(f"{EMBED}-{id}", worker, slots, workers)] if slots else []
    if merge:
        shards = [*merge, "--task", "shards", "--slots", str(merge_tasks)]
        steps += [
            SlurmStep(f"clip-batch-train-{id}", [*merge, "--task", "train"], after="afterany" if slots else ""),
            SlurmStep(f"clip-batch-shards-{id}", shards, merge_tasks, after="afterok"),
            SlurmStep(f"clip-batch-manifest-{id}", [*merge, "--task", "manifest"], after="afterok"),
        ]
    return steps


def scripts(steps: Sequence[SlurmStep], config: SlurmConfig, folder: Path) -> Iterator[str]:
    """The sbatch scripts that `submit` submits, with JOBID in the place of job ids that are not known yet."""
    limit = _array_limit()
    before: list[str] = []
    for step in steps:
        for first in range(0, step.tasks, limit) or [0]:
            executor = _executor(step, config, folder, before)
            if (count := min(limit, step.tasks - first)) > 1:  # as submitit does for arrays
                executor.parameters["map_count"] = count
            yield executor._make_submission_file_text(executor._submitit_command_str, "")
        before = ["JOBID"]


def submit(steps: Sequence[SlurmStep], main: Main, config: SlurmConfig, folder: Path, say: Say) -> None:
    """Submit the steps to sbatch, without waiting for any; ConfigError names the step that sbatch refuses."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder.mkdir(parents=True, exist_ok=True)
    limit = _array_limit()
    before: list[str] = []
    for step in steps:
        ids: list[str] = []
        slots: list[int | None] = [*range(0, step.slots, step.workers)] or [None]
        while slots:
            array, slots = slots[:limit], slots[limit:]
            executor = _executor(step, config, folder, before)
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # submitit prints sbatch's errors, and raises them too
                    jobs = executor.map_array(Task(main), [step.command] * len(array), array)
            except (FailedJobError, FailedSubmissionError) as error:
                submitted = f"; {' '.join(ids)} were submitted: scancel them, or let them run" if ids else ""
                raise ConfigError(f"sbatch refused {step.name}: {_reason(error)}{submitted}") from None
            ids.append(jobs[0].job_id.partition("_")[0])
        dependency = f", {step.after} {':'.join(before)}" if before else ""
        say(f"{step.name}: {max(step.tasks, 1)} tasks as job {', '.join(ids)}{dependency}")
        before = ids


def _array_limit() -> int:
    """MaxArraySize, which array indices must stay below."""
    try:
        settings = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"no SLURM answers here ({_reason(error)}): run submit slurm on a login node") from None
    size = re.search(r"^MaxArraySize\s*=\s*(\d+)", settings, re.MULTILINE)
    return max(1, int(size[1])) if size else 1001


def _reason(error: Exception) -> str:
    """The end of what a command printed to stderr, or of the error itself, on one line."""
    return one_line(getattr(error, "stderr", "") or str(error))[-300:]


def _executor(step: SlurmStep, config: SlurmConfig, folder: Path, before: list[str]) -> Any:
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise ConfigError("submit slurm needs submitit: pip install 'clip-batch[slurm]'") from None

    step_config = config if step.name.startswith(EMBED) else _merge_config(config)
    try:
        executor = SlurmExecutor(folder, max_num_timeout=config.timeouts, python=_python(step_config))
        executor.update_parameters(**_parameters(step, step_config, before))
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


def _parameters(step: SlurmStep, config: SlurmConfig, before: list[str]) -> dict[str, Any]:
    """submitit's parameters; the cluster decides what is empty in the config."""
    more: dict[str, Any] = {"requeue" if config.requeue else "no-requeue": True}
    if before:
        more["kill-on-invalid-dep"] = "yes"  # a merge behind a failed task would otherwise stay pending for ever
    named = {
        "mail_user": config.mail_user,
        "mail_type": config.mail_type,
        "dependency": f"{step.after}:{':'.join(before)}" if before else "",
    }
    return {
        **_resources(config),
        "job_name": step.name,
        "time": config.time,
        "nodes": config.nodes,
        "ntasks_per_node": config.tasks_per_node,
        "cpus_per_task": config.cpus_per_task,
        "signal_delay_s": config.grace,
        "array_parallelism": config.concurrency,
        "stderr_to_stdout": True,
        "wckey": None,
        "setup": [_REQUEUE_TRAP, "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}", *config.setup],
        "srun_args": ["--kill-on-bad-exit=0", f"--cpus-per-task={config.cpus_per_task}", *_pyxis(config)],
        "additional_parameters": {**more, **config.sbatch},
        **{name: value for name, value in named.items() if value},
    }


def _resources(config: SlurmConfig) -> dict[str, Any]:
    """The resources of a task by the names that sbatch and srun use, without those that are empty."""
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
    """The command that starts Python in a task; None for this interpreter."""
    if config.container == "apptainer":
        mounts = [f"--bind {mount}" for mount in config.container_mounts.split(",") if mount]
        gpu = ["--nv"] if config.gpus_per_task or config.gres else []
        return " ".join(["apptainer exec", *gpu, *mounts, config.container_image, config.container_python])
    return config.container_python if config.container else None


def on_node(config: SlurmConfig, command: list[str]) -> list[str]:
    """The srun command line that runs a clip-batch command on one node, with the resources of a worker."""
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in _resources(config).items()
    ]
    size = ["--nodes=1", "--ntasks=1", f"--cpus-per-task={config.cpus_per_task}", "--job-name=clip-batch-doctor"]
    python = _python(config) or shlex.quote(sys.executable)
    return ["srun", *size, *flags, *_pyxis(config), *shlex.split(python), "-m", "clip_batch", *command]


def wait(steps: Sequence[SlurmStep], progress: Callable[[], str], say: Say) -> None:
    """Wait until no step is in the queue, and meanwhile say `progress()` whenever it has changed."""
    names = ",".join(step.name for step in steps)
    last = ""
    while True:
        queue = subprocess.run(["squeue", "--noheader", f"--name={names}"], capture_output=True, text=True)
        if queue.returncode == 0 and not queue.stdout.strip():
            return
        if (now := progress()) != last:
            say(now)
            last = now
        time.sleep(POLL)
