"""A real SLURM for the tests: one slurmctld and two slurmd on loopback, each with two pretended GPUs.

Everything lies in one temporary folder, on free ports, without munge, and needs root and Debian's
`slurm-wlm`. All processes have the folder's SLURM_CONF in their environment, by which a
keeper process kills them when this process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from clip_batch.types import parse_numbers
from tests.servers import processes

NODES = ("n1", "n2")
MAX_ARRAY_SIZE = 64
ENDED = frozenset(("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"))
"""Final states of jobs. A requeued job is PENDING again before it could be seen in one."""

TIMEOUT = 240.0
"""Seconds to wait for what takes a few on an idle machine."""

# MinJobAge keeps ended jobs in view, as there is no sacct. cred_expire is also how long a requeued job waits, unless
# `requeued` lets it start; like the timeouts, it must do on a slow and busy machine. debug's jobs are requeued for
# urgent's, GraceTime seconds after their warning.
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=30
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
MinJobAge=86400
MailProg=/bin/true
MaxArraySize={array}
KillWait=3
SlurmdTimeout=20
SlurmctldTimeout=20
MessageTimeout=30
BatchStartTimeout=60
UnkillableStepTimeout=120
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=128000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 RealMemory=128000 Gres=gpu:2
PartitionName=debug Nodes=ALL Default=YES PriorityTier=1 GraceTime=20
PartitionName=short Nodes=ALL MaxTime=2 PriorityTier=1 PreemptMode=OFF
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster; `env` is the environment of its commands."""

    folder: Path
    env: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *command: str, check: bool = True) -> str:
        """Run a SLURM command; returns its standard output. AssertionError with its standard error if it fails."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr or done.stdout}"
        return done.stdout

    def sbatch(self, *arguments: str) -> str:
        """Submit a job; returns its id."""
        return self.run("sbatch", "--parsable", *arguments).strip().partition(";")[0]

    def squeue(self, *arguments: str) -> str:
        """The queue, without a heading."""
        return self.run("squeue", "--noheader", *arguments)

    def job(self, job: str) -> list[dict[str, str]]:
        """The fields of a job as scontrol shows them, a dict for each element of an array that it lists."""
        lines = self.run("scontrol", "show", "job", "--oneliner", job).splitlines()
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines if line.strip()]

    def states(self, job: str) -> dict[str, tuple[str, int]]:
        """Array task ("0" for a plain job; "2-5" while they wait) -> state, exit code (128 + n for signal n)."""
        found = {}
        for fields in self.job(job):
            code, ended_by = map(int, fields["ExitCode"].split(":"))
            task = fields.get("ArrayTaskId", "0")
            found[task] = fields["JobState"], 128 + ended_by if ended_by else code
        return found

    def wait(self, job: str, timeout: float = TIMEOUT) -> dict[int, tuple[str, int]]:
        """Wait until all of a job has ended; array task (0 for a plain job) -> state and exit code."""
        until = time.monotonic() + timeout
        states = self.states(job)
        while not ENDED.issuperset(state for state, _ in states.values()):
            assert time.monotonic() < until, f"job {job} has not ended in {timeout} s: {self.job(job)}"
            time.sleep(0.2)
            states = self.states(job)
        # An array cancelled while it waited is one record of all its tasks.
        return {number: result for task, result in states.items() for number in parse_numbers(task.partition("%")[0])}

    def requeued(self, job: str, times: int = 1, timeout: float = TIMEOUT) -> None:
        """Wait until each task of a job was requeued so many times, and let it start soon, not after its delay.

        It starts 2 s later: in the second in which slurmd ended it, slurmd would refuse it.
        """
        until = time.monotonic() + timeout
        tasks = self.job(job)
        while late := [task for task in tasks if int(task["Restarts"]) < times or task["JobState"] == "COMPLETING"]:
            assert ENDED.isdisjoint(task["JobState"] for task in late), f"job {job} has ended: {late}"
            assert time.monotonic() < until, f"job {job} is not requeued in {timeout} s: {late}"
            time.sleep(0.2)
            tasks = self.job(job)
        for task in tasks:
            name = f"{task['ArrayJobId']}_{task['ArrayTaskId']}"
            self.run("scontrol", "update", f"JobId={name}", "StartTime=now+2", check=False)  # it may have started

    def kill_slurmd(self, node: str) -> None:
        """kill -9 a slurmd and all processes of its node, as in a power failure."""
        processes.kill_all(_mark(self.folder), f"SLURMD_NODENAME={node}")
        self.daemons[node].wait()

    def start_slurmd(self, node: str, timeout: float = TIMEOUT) -> None:
        """Start a slurmd and wait until its node is up."""
        self._spawn(node, "slurmd", "-D", "-c", "-N", node)
        self._until_up((node,), timeout)

    def start(self) -> None:
        """Start all daemons and wait until both nodes are up."""
        self._spawn("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self._spawn(node, "slurmd", "-D", "-c", "-N", node)
        self._until_up(NODES, TIMEOUT)

    def _spawn(self, name: str, *command: str) -> None:
        # The node's name in slurmd's environment marks its slurmstepd too; tasks have it from SLURM.
        env = {**self.env, "SLURMD_NODENAME": name}
        with (self.folder / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def _until_up(self, nodes: tuple[str, ...], timeout: float) -> None:
        until = time.monotonic() + timeout
        command = ("sinfo", "--noheader", "-N", "-p", "debug", "-o", "%t", "-n", ",".join(nodes))
        while set(states := self.run(*command, check=False).split()) - {"idle", "mix", "alloc"} or not states:
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            assert not dead, f"{dead} ended: see the logs in {self.folder}"
            assert time.monotonic() < until, f"nodes are {states}: see the logs in {self.folder}"
            time.sleep(0.1)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM of two nodes that runs for the whole session; skips where it cannot be started."""
    if not all(map(_which, ("slurmctld", "slurmd", "sbatch"))):
        pytest.skip("SLURM is not installed: make services")
    if os.geteuid() != 0:
        pytest.skip("the test SLURM's daemons need root")
    try:
        with cluster(tmp_path_factory.mktemp("slurm")) as running:
            yield running
    except PermissionError:
        pytest.skip("the test SLURM needs leave to make device files")


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Run a SLURM of two nodes within the block, with all its files in a folder; PermissionError unless root."""
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    for number in range(2):
        os.mknod(folder / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    host = socket.gethostname().partition(".")[0]
    conf = _CONF.format(host=host, folder=folder, ports=processes.free_ports(3), array=MAX_ARRAY_SIZE)
    (folder / "slurm.conf").write_text(conf)
    (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-1]\n")
    ours = {name: value for name, value in os.environ.items() if not name.startswith("CLIP_BATCH_")}
    env = {**ours, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    running = Slurm(folder, env)
    with processes.kept(_mark(folder)):
        running.start()
        yield running
    for daemon in running.daemons.values():
        daemon.wait()


def signalling(slurm: Slurm, folder: Path) -> Slurm:
    """The cluster with a squeue that shows running jobs as it does while SLURM is sending them a signal."""
    folder.mkdir()
    squeue = folder / "squeue"
    squeue.write_text(f'#!/bin/sh\n{shutil.which("squeue", path=_path())} "$@" | sed s/^RUNNING$/SIGNALING/\n')
    squeue.chmod(0o755)
    return replace(slurm, env={**slurm.env, "PATH": f"{folder}{os.pathsep}{slurm.env['PATH']}"})


def mine(folder: Path, *variables: str) -> set[int]:
    """Ids of this cluster's processes, daemons and jobs, whose environment has all of these NAME=VALUE."""
    return processes.mine(_mark(folder), *variables)


def _mark(folder: Path) -> str:
    return f"SLURM_CONF={folder}/slurm.conf"


def _path() -> str:
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath), "/usr/sbin"])


def _which(command: str) -> str | None:
    return shutil.which(command, path=_path())
