"""doctor: this machine or a compute node, checked or measured."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from clip_batch.cli.arguments import JsonArguments, answer, say
from clip_batch.config import EmbedConfig, SlurmConfig, StorageConfig
from clip_batch.config.values import Count
from clip_batch.errors import ConfigError

if TYPE_CHECKING:
    import subprocess


@dataclass(frozen=True, kw_only=True)
class DoctorArguments(JsonArguments):
    """What `doctor` looks at, and where it runs."""

    output: str = ""
    """The embeddings folder OUT whose storage and plan are checked too; --calibrate needs it."""
    on_node: bool = False
    """Run on a compute node, through srun with the options of `submit slurm`, instead of on this machine."""
    calibrate: bool = False
    """Instead of the checks, measure what bounds embed here and what to set (for --slots workers)."""
    slots: Count | None = None
    """How many workers --calibrate assumes to share the plan; default: 1."""


def doctor(arguments: DoctorArguments, embed: EmbedConfig, slurm: SlurmConfig, storage: StorageConfig) -> int:
    """Check this machine, the storage and the plan before a long run; or measure, with --calibrate."""
    from clip_batch.launch.doctor import Check, doctor

    if arguments.calibrate:
        return _calibrate(arguments, embed, slurm, storage)
    if arguments.on_node and "SLURM_JOB_ID" not in os.environ:
        checks = [Check(**check) for check in _checks_on_node(arguments, embed, slurm, storage)]
    else:
        checks = doctor(arguments.output or None, storage, arguments.on_node)
    marks = {True: "ok  ", False: "FAIL", None: "info"}
    lines = [f"{marks[check.ok]} {check.name}: {check.message}" for check in checks]
    answer(arguments, [asdict(check) for check in checks], "\n".join(lines))
    return 1 if any(check.ok is False for check in checks) else 0


def _checks_on_node(
    arguments: DoctorArguments, embed: EmbedConfig, slurm: SlurmConfig, storage: StorageConfig
) -> list[dict[str, Any]]:
    """The report of a compute node."""
    flags = ["--json", "--output", arguments.output] if arguments.output else ["--json"]
    try:
        checks: list[dict[str, Any]] = json.loads(_on_node(flags, embed, slurm, storage, capture=True).stdout)
    except ValueError as error:
        raise ConfigError(f"the doctor did not report from a node ({error}): see what srun says above") from None
    return checks


def _calibrate(arguments: DoctorArguments, embed: EmbedConfig, slurm: SlurmConfig, storage: StorageConfig) -> int:
    """Measure what embed is bound by, here or on a compute node."""
    from clip_batch.embeddings.calibrate import calibrate
    from clip_batch.embeddings.calibration_report import describe

    if not arguments.output:
        raise ConfigError("--output OUT is needed: the embeddings folder")
    workers = arguments.slots or 1
    if arguments.on_node and "SLURM_JOB_ID" not in os.environ:
        flags = ["--calibrate", "--output", arguments.output, "--slots", str(workers)]
        return _on_node([*flags, "--json"] if arguments.json else flags, embed, slurm, storage).returncode
    measured = calibrate(arguments.output, embed, storage, workers)
    answer(arguments, asdict(measured), describe(measured))
    return 0


def _on_node(
    flags: list[str], embed: EmbedConfig, slurm: SlurmConfig, storage: StorageConfig, capture: bool = False
) -> subprocess.CompletedProcess[str]:
    """`doctor` run on a compute node, with this one's options in its environment, where credentials are safe."""
    import subprocess

    from clip_batch.launch import local
    from clip_batch.launch.slurm import on_node

    command = on_node(slurm, ["doctor", "--on-node", *flags])
    say(f"waiting for a node: {' '.join(command)}")
    environment = local.environment(embed, storage)
    try:
        return subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, env=environment)
    except OSError as error:
        raise ConfigError(f"no node can be asked ({error}): srun must be on PATH") from None
