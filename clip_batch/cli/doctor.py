"""doctor: this machine or a compute node, checked or measured."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from clip_batch.cli.arguments import Options, answer, say
from clip_batch.errors import ConfigError

if TYPE_CHECKING:
    import subprocess


def doctor(options: Options) -> int:
    """Check this machine, the storage and the plan before a long run; or measure, with --calibrate."""
    from clip_batch.launch.doctor import Check, doctor

    if options.target.calibrate:
        return _calibrate(options)
    here = not options.target.on_node or "SLURM_JOB_ID" in os.environ
    checks = doctor(options.target.output or None, options.storage, options.target.on_node) if here else []
    if not here:
        checks = [Check(**check) for check in _doctor_on_node(options)]
    marks = {True: "ok  ", False: "FAIL", None: "info"}
    answer(
        options, [asdict(check) for check in checks], "\n".join(f"{marks[c.ok]} {c.name}: {c.message}" for c in checks)
    )
    return 1 if any(check.ok is False for check in checks) else 0


def _doctor_on_node(options: Options) -> list[dict[str, Any]]:
    """The report of a compute node."""
    output = ["--output", options.target.output] if options.target.output else []
    try:
        found: list[dict[str, Any]] = json.loads(_on_node(options, ["--json", *output], capture=True).stdout)
    except ValueError as error:
        raise ConfigError(f"the doctor did not report from a node ({error}): see what srun says above") from None
    return found


def _calibrate(options: Options) -> int:
    """Measure what embed is bound by, here or on a compute node."""
    from clip_batch.embeddings.calibrate import calibrate, describe

    output, workers = options.output, options.target.slots or 1
    if options.target.on_node and "SLURM_JOB_ID" not in os.environ:
        flags = ["--calibrate", "--output", output, "--slots", str(workers)]
        return _on_node(options, [*flags, "--json"] if options.target.json else flags).returncode
    found = calibrate(output, options.embed, options.storage, workers)
    answer(options, asdict(found), describe(found))
    return 0


def _on_node(options: Options, flags: list[str], capture: bool = False) -> subprocess.CompletedProcess[str]:
    """`doctor` run on a compute node, with this one's options in its environment, where credentials are safe."""
    import subprocess

    from clip_batch.launch import local, slurm

    command = slurm.on_node(options.slurm, ["doctor", "--on-node", *flags])
    say(f"waiting for a node: {' '.join(command)}")
    environment = local.environment(options.embed, options.storage)
    try:
        return subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, env=environment)
    except OSError as error:
        raise ConfigError(f"no node can be asked ({error}): srun must be on PATH") from None
