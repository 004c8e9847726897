"""The templates of slurm/ on a real SLURM: the whole chain on the demo set, and what goes wrong on clusters."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clip_batch.cli import main
from clip_batch.demo import data
from clip_batch.embeddings import commits
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.workers import read_records
from clip_batch.storage.store import Store
from tests import ROOT, corpus
from tests.servers.hold import Hold
from tests.servers.slurm_cluster import TIMEOUT, Slurm, mine, signalling

pytestmark = pytest.mark.slow

EMBED, MERGE, CHAIN = (str(ROOT / "slurm" / name) for name in ("embed.sbatch", "merge.sbatch", "chain.sh"))
SMALL = ("--cpus-per-task=1", "--mem-per-cpu=500M")
ALONE = "--export=ALL,TASKS=2,CLIP_BATCH_EMBED_SHARE=false"  # or others do what a killed worker leaves


def for_whole_nodes(folder: Path) -> Path:
    """A copy of the templates in a folder, edited for whole nodes as they say; its path."""
    copy = Path(shutil.copytree(ROOT / "slurm", folder / "slurm"))
    text = (copy / "embed.sbatch").read_text()
    for old, new in (
        ("#SBATCH --ntasks=1 ", "#"),
        ("##SBATCH --exclusive", "#SBATCH --exclusive"),
        ("##SBATCH --ntasks-per-node=8", "#SBATCH --ntasks-per-node=2"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (copy / "embed.sbatch").write_text(text)
    return copy


@dataclass(frozen=True)
class Work:
    """A plan over a folder of tars, and the environment in which the templates embed it, as far as `hold` lets them."""

    slurm: Slurm
    folder: Path
    tars: list[str]
    hold: Hold

    @property
    def out(self) -> str:
        return str(self.folder / "out")

    def sbatch(self, *arguments: str, script: str = EMBED) -> str:
        return self.slurm.sbatch(f"--chdir={self.folder}", *SMALL, *arguments, script)

    def committed(self) -> set[int]:
        return commits.committed(Store(self.out))

    def wait_for(self, condition: Callable[[], bool], timeout: float = TIMEOUT) -> None:
        until = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < until, f"{self.slurm.squeue()}\n{self.logs()}"
            time.sleep(0.05)

    def start(self, slots: int, *arguments: str, script: str = EMBED) -> str:
        """Submit a job, and wait until each slot has committed something; its workers are then held at the second tar.

        Its id.
        """
        self.hold.at("1.tar")
        job = self.sbatch(*arguments, script=script)
        self.wait_for(lambda: {number % slots for number in self.committed()} == set(range(slots)))
        return job

    def processes(self, job: str, task: int, worker: int = 0) -> set[int]:
        """Process ids of a worker of an element."""
        element = f"SLURM_ARRAY_JOB_ID={job}", f"SLURM_ARRAY_TASK_ID={task}"
        return mine(self.slurm.folder, *element, "SLURM_STEP_ID=0", f"SLURM_PROCID={worker}")

    def kill(self, job: str, task: int, number: signal.Signals, worker: int = 0) -> None:
        """Signal a worker of an element behind SLURM's back."""
        (pid,) = self.processes(job, task, worker)
        os.kill(pid, number)

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def restarts(self, job: str) -> dict[int, int]:
        return {int(fields.get("ArrayTaskId", 0)): int(fields["Restarts"]) for fields in self.slurm.job(job)}

    def check(self) -> None:
        """Nothing is missing or unsound, and every readable sample of the tars is there exactly once."""
        assert main(["verify", "--output", self.out, "--deep"]) == 0
        store = Store(self.out)
        keys, failed = list[str](), list[str]()
        for commit in read_commits(store).values():
            for folder, found in (("metadata", keys), ("failures", failed)):
                if name := commit.file(folder):
                    found += pq.read_table(store.path(name), columns=["key"])["key"].to_pylist()
        wanted = [key for tar in self.tars for key in corpus.tar_keys(tar)]
        assert sorted(keys + failed) == sorted(wanted)
        assert all(key.startswith("bad") for key in failed)


@pytest.fixture
def work(slurm: Slurm, tmp_path: Path) -> Iterator[Work]:
    """800 pictures in 40 partitions, and a tar of bad ones."""
    picture = corpus.jpeg(1)
    (tmp_path / "tars").mkdir()
    tars = []
    for tar in range(4):
        files = [(f"{tar}-{number:04d}.jpg", picture) for number in range(200)]
        tars.append(corpus.write_tar(f"{tmp_path}/tars/{tar}.tar", files))
    bad = [(f"bad-{name}", content) for name, (content, _) in corpus.bad_images().items()]
    tars.append(corpus.write_tar(f"{tmp_path}/tars/poison.tar", bad))
    plan = ["plan", "--input", f"{tmp_path}/tars", "--model", "fake:8", "--partition-samples", "20"]
    assert main([*plan, "--output", f"{tmp_path}/out"]) == 0
    options = {"OUT": f"{tmp_path}/out", "CLIP_BATCH_EMBED_DEVICE": "cpu", "CLIP_BATCH_EMBED_BATCH_SIZE": "2"}
    options["CLIP_BATCH_EMBED_ALLOW_EMPTY"] = "1"  # one partition has bad pictures alone
    with Hold(tmp_path / "hold") as hold:
        yield Work(replace(slurm, env={**slurm.env, **options, **hold.env, "TASKS": "4"}), tmp_path, tars, hold)


def test_the_cluster_has_two_nodes_of_two_gpus(slurm: Slurm, tmp_path: Path) -> None:
    log = tmp_path / "log"
    wrapped = "srun bash -c 'echo $SLURMD_NODENAME $SLURM_PROCID $CUDA_VISIBLE_DEVICES'"
    arguments = ("--ntasks=4", "--gpus-per-task=1", "--ntasks-per-node=2", f"--output={log}", "--wrap", wrapped)
    assert slurm.wait(slurm.sbatch(*arguments)) == {0: ("COMPLETED", 0)}
    assert sorted(log.read_text().splitlines()) == ["n1 0 0", "n1 1 1", "n2 2 0", "n2 3 1"]


@pytest.mark.parametrize(
    "command",
    [(EMBED,), (MERGE,), ("--array=0-7", MERGE, "shards")],
)
def test_sbatch_accepts_the_templates_as_they_are(slurm: Slurm, command: tuple[str, ...]) -> None:
    slurm.run("sbatch", "--test-only", *command)


@pytest.mark.parametrize(("whole", "tasks", "tars"), [(False, 4, 8), (True, 2, 3)])
def test_the_chain_on_the_demo_set(slurm: Slurm, tmp_path: Path, whole: bool, tasks: int, tars: int) -> None:
    data.write_tars(str(tmp_path / "tars"))
    out, index = str(tmp_path / "out"), str(tmp_path / "index")
    inputs = [f"{tmp_path}/tars/{number:05d}.tar" for number in range(tars)]
    plan = ["plan", "--input", *inputs, "--model", "demo", "--partition-samples", "60"]
    assert main([*plan, "--output", out]) == 0
    env = {"OUT": out, "INDEX": index, "TASKS": str(tasks), "MERGE_TASKS": "2"}
    env |= {"CLIP_BATCH_EMBED_DEVICE": "cpu", "CLIP_BATCH_MERGE_SHARD_ROWS": "400"}
    command = [str(for_whole_nodes(tmp_path) / "chain.sh") if whole else CHAIN, *SMALL]
    done = subprocess.run(command, env={**slurm.env, **env}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    embed, train, shards, manifest = (item.split()[-1] for item in done.stdout.split(","))
    assert slurm.wait(embed) == dict.fromkeys(range(tasks), ("COMPLETED", 0))
    logs = [path.read_text() for path in tmp_path.glob(f"clip-embed-{embed}_*.log")]
    assert sum(len(re.findall(r"^\d+ partitions? done", log, re.MULTILINE)) for log in logs) == 4
    assert main(["verify", "--output", out, "--deep"]) == 0
    assert slurm.wait(train) == {0: ("COMPLETED", 0)}
    assert slurm.wait(shards) == dict.fromkeys(range(2), ("COMPLETED", 0))
    assert slurm.wait(manifest) == {0: ("COMPLETED", 0)}
    assert main(["verify", "--index", index, "--deep"]) == 0


def test_merge_refuses_an_incomplete_output_and_the_chain_ends(work: Work) -> None:
    env = {**work.slurm.env, "INDEX": str(work.folder / "index"), "TASKS": "1", "MERGE_TASKS": "2"}
    done = subprocess.run(
        [CHAIN, "--hold", *SMALL], env=env, cwd=work.folder, capture_output=True, text=True, check=True
    )
    embed, train, shards, manifest = (item.split()[-1] for item in done.stdout.split(","))
    work.slurm.run("scancel", embed)
    assert work.slurm.wait(train) == {0: ("FAILED", 1)}
    assert "--partitions 0-40" in work.logs()
    assert {state for state, _ in work.slurm.wait(shards).values()} == {"CANCELLED"}
    assert work.slurm.wait(manifest)[0][0] == "CANCELLED"
    refused = subprocess.run([CHAIN], env={**env, "TASKS": "65"}, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "MaxArraySize, 64" in refused.stderr


def test_a_warning_and_a_requeue_touch_their_own_elements_only(work: Work) -> None:
    job = work.start(4, "--array=0-3")
    behind = work.slurm.sbatch(f"--dependency=afterany:{job}", f"--chdir={work.folder}", "--wrap=:")
    work.slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
    work.slurm.run("scontrol", "requeue", f"{job}_1")
    for task in range(2):
        work.slurm.requeued(f"{job}_{task}")
    work.hold.release()
    assert work.slurm.wait(job) == dict.fromkeys(range(4), ("COMPLETED", 0)), work.logs()
    assert work.restarts(job) == {0: 1, 1: 1, 2: 0, 3: 0}
    assert work.slurm.wait(behind) == {0: ("COMPLETED", 0)}
    last = max(fields["EndTime"] for fields in work.slurm.job(job))
    assert work.slurm.job(behind)[0]["StartTime"] >= last
    work.check()


def test_a_killed_worker_of_a_whole_node_leaves_the_others_alone(work: Work) -> None:
    script = str(for_whole_nodes(work.folder) / "embed.sbatch")
    job = work.start(4, "--array=0-1", ALONE, script=script)
    work.kill(job, 1, signal.SIGKILL, worker=1)
    work.hold.release()
    assert work.slurm.wait(job) == {0: ("COMPLETED", 0), 1: ("FAILED", 137)}, work.logs()
    assert {number % 4 for number in set(range(41)) - work.committed()} == {3}
    again = work.sbatch("--array=1", ALONE, script=script)
    assert work.slurm.wait(again) == {1: ("COMPLETED", 0)}
    work.check()


def test_a_warned_node_goes_on_whatever_one_of_its_workers_died_of(work: Work) -> None:
    script = str(for_whole_nodes(work.folder) / "embed.sbatch")
    job = work.start(2, "--array=0", "--export=ALL,TASKS=1,CLIP_BATCH_EMBED_SHARE=false", script=script)
    work.kill(job, 0, signal.SIGKILL, worker=1)
    work.slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
    work.slurm.requeued(f"{job}_0")
    work.hold.release()
    assert work.slurm.wait(job) == {0: ("COMPLETED", 0)}, work.logs()
    assert work.restarts(job) == {0: 1}
    work.check()


def test_a_node_dies_and_its_elements_go_on_elsewhere(work: Work) -> None:
    job = work.start(4, "--array=0-3")
    work.slurm.kill_slurmd("n2")
    try:
        for fields in work.slurm.job(job):
            if fields["NodeList"] == "n2":
                work.slurm.requeued(f"{job}_{fields['ArrayTaskId']}")
        work.hold.release()
        assert work.slurm.wait(job) == dict.fromkeys(range(4), ("COMPLETED", 0)), work.logs()
        assert sorted(work.restarts(job).values()) == [0, 0, 1, 1]
        assert {fields["NodeList"] for fields in work.slurm.job(job)} == {"n1"}
    finally:
        work.slurm.start_slurmd("n2")
    work.check()


def test_two_arrays_over_one_plan_preempted_by_a_higher_priority(work: Work) -> None:
    work.hold.at("1.tar")
    jobs = [work.sbatch("--array=0-1", "--export=ALL,TASKS=2") for _ in range(2)]
    work.wait_for(lambda: len(read_records(Store(work.out))) == 4)  # all listen for signals
    urgent = work.slurm.sbatch("--partition=urgent", "--nodes=2", "--exclusive", f"--chdir={work.folder}", "--wrap=:")
    assert work.slurm.wait(urgent) == {0: ("COMPLETED", 0)}
    assert len(work.committed()) < 41
    work.hold.release()
    for job in jobs:
        work.slurm.requeued(job)
    for job in jobs:
        assert work.slurm.wait(job) == dict.fromkeys(range(2), ("COMPLETED", 0)), work.logs()
        assert set(work.restarts(job).values()) == {1}
    work.check()


def test_a_worker_signalled_before_it_listens_is_requeued(work: Work) -> None:
    work = replace(work, slurm=signalling(work.slurm, work.folder / "bin"))
    work.hold.at("")
    job = work.sbatch("--array=0-1", "--export=ALL,TASKS=2")
    work.wait_for(lambda: all(work.processes(job, task) for task in range(2)))
    work.slurm.run("scancel", "--signal=TERM", f"{job}_0")  # as preemption does
    work.slurm.run("scancel", "--signal=USR1", "--batch", f"{job}_1")  # as the time limit's warning does
    work.slurm.requeued(job)
    work.hold.release()
    assert work.slurm.wait(job) == dict.fromkeys(range(2), ("COMPLETED", 0)), work.logs()
    assert work.restarts(job) == {0: 1, 1: 1}
    work.check()


def test_the_time_limit_requeues_and_a_cancelled_job_stays_cancelled(work: Work) -> None:
    cancelled = work.start(1, "--array=0", ALONE)
    work.slurm.run("scancel", cancelled)
    limits = "--partition=short", "--time=2", "--signal=B:USR1@70"  # SLURM may warn half a minute earlier
    limited = work.start(2, *limits, "--array=1", ALONE)
    work.wait_for(lambda: "warned" in work.logs())
    work.slurm.requeued(limited)
    work.hold.release()
    assert work.slurm.wait(limited) == {1: ("COMPLETED", 0)}, work.logs()
    assert work.restarts(limited)[1] >= 1
    assert work.slurm.wait(cancelled)[0][0] == "CANCELLED"
    assert work.restarts(cancelled) == {0: 0}
    assert set(range(1, 41, 2)) <= work.committed() != set(range(41))
    assert work.slurm.wait(work.sbatch("--array=0-3")) == dict.fromkeys(range(4), ("COMPLETED", 0))
    work.check()
