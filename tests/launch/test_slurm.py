"""`submit slurm` on a real SLURM: arrays through submitit, the merge chain, preemption, frozen submissions."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clip_batch.cli import main
from clip_batch.demo import data
from clip_batch.embeddings import commits, submission
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.status import status
from clip_batch.embeddings.workers import read_records
from clip_batch.storage.store import Store
from tests import corpus
from tests.servers.hold import Hold
from tests.servers.slurm_cluster import MAX_ARRAY_SIZE, NODES, TIMEOUT, Slurm, mine, signalling
from tests.servers.spark_cluster import finish, installed, local_cluster

pytestmark = pytest.mark.slow

SMALL = ["--device", "cpu", "--memory", "500MB", "--time", "20", "--grace", "30"]


class Cluster:
    """A plan over tars, one a partition, and `clip-batch` on the cluster; its workers go as far as `hold` lets them."""

    def __init__(self, slurm: Slurm, folder: Path, hold: Hold) -> None:
        self.folder, self.out, self.index = folder, str(folder / "out"), str(folder / "index")
        self.hold, self.slurm = hold, replace(slurm, env={**slurm.env, **hold.env})

    def plan(self, tars: int, pictures: int) -> None:
        for number in range(tars):
            corpus.good_tar(str(self.folder / f"{number:03d}.tar"), pictures, seed=number)
        arguments = ["--input", f"{self.folder}/*.tar", "--model", "fake:8", "--partition-count", str(tars)]
        assert main(["plan", *arguments, "--output", self.out]) == 0

    def submit(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """Standard output and error of `submit slurm`."""
        command = [sys.executable, "-m", "clip_batch", "submit", "slurm", "--output", self.out, *SMALL, *arguments]
        done = subprocess.run(command, env=self.slurm.env, capture_output=True, text=True, timeout=500)
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done.stdout, done.stderr

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("out/_clip_batch/logs/*/*.out")))

    def committed(self) -> set[int]:
        return commits.committed(Store(self.out))

    def until(self, condition: Callable[[], bool], timeout: float = TIMEOUT) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"{self.slurm.squeue()}\n{self.logs()}"
            time.sleep(0.05)

    def until_all_commit(self, tasks: int, before: frozenset[int] = frozenset()) -> None:
        """Until each of the tasks has committed something more than `before`."""
        self.until(lambda: {number % tasks for number in self.committed() - before} == set(range(tasks)))

    def check(self, rows: int) -> None:
        """`verify --deep` passes, and there are so many rows, each once."""
        assert main(["verify", "--output", self.out, "--deep"]) == 0
        keys = [
            (row["shard"], row["key"])
            for commit in read_commits(Store(self.out)).values()
            for row in pq.read_table(f"{self.out}/{commit.file('metadata')}", columns=["shard", "key"]).to_pylist()
        ]
        assert len(keys) == len(set(keys)) == rows


def jobs(said: str, kind: str) -> list[str]:
    """Job ids of a kind of work, as `submit` said them."""
    found = re.search(rf"clip-batch-{kind}-\S+: \d+ tasks as job (\d+(?:, \d+)*)", said)
    assert found, said
    return found[1].split(", ")


@pytest.fixture
def cluster(slurm: Slurm, tmp_path: Path) -> Iterator[Cluster]:
    with Hold(tmp_path / "hold") as hold:
        yield Cluster(slurm, tmp_path, hold)


def test_the_whole_chain_on_the_demo_set(cluster: Cluster) -> None:
    tars = data.write_tars(str(cluster.folder / "tars"))
    plan = ["plan", "--input", *tars, "--model", "demo", "--partition-count", "6", "--output", cluster.out]
    assert main(plan) == 0
    gpu = ["--gpus-per-task", "1", "--tasks", "4"]
    merge = ["--index", cluster.index, "--merge-cpus", "1", "--merge-memory", "1GB", "--merge-tasks", "2"]
    shown, _ = cluster.submit(*gpu, *merge, "--shard-rows", "1000", "--dry-run")
    assert not Path(cluster.out, "_clip_batch/submissions").exists()
    _, said = cluster.submit(*gpu, *merge, "--shard-rows", "1000", "--wait")
    assert "6 of 6 partitions done" in said
    handed_in = Path(cluster.out, "_clip_batch/logs").glob("*/*_submission.sh")
    for script in handed_in:
        text = re.sub(r"\d{8}-\d{6}-[0-9a-f]{6}", "ID", script.read_text())
        text = re.sub(r"(after\w+):[\d:]+", r"\1:JOBID", text)
        assert text.strip() in re.sub(r"\d{8}-\d{6}-[0-9a-f]{6}", "ID", shown)
    assert shown.count("#!/bin/bash") == 4
    assert main(["verify", "--output", cluster.out, "--deep"]) == 0
    assert main(["verify", "--index", cluster.index, "--deep"]) == 0
    assert cluster.submit()[1].strip() == "nothing is missing"


def test_arrays_are_split_under_the_limit_and_slots_keep_their_meaning(cluster: Cluster) -> None:
    cluster.plan(MAX_ARRAY_SIZE + 6, 2)
    _, said = cluster.submit("--concurrency", "8", "--begin-now", code=2)
    assert "--begin-now" in said
    held = json.dumps({"hold": True})
    _, said = cluster.submit("--sbatch", held)
    arrays = jobs(said, "embed")
    assert [len(cluster.slurm.job(job)) > 0 for job in arrays] == [True, True]
    store = Store(cluster.out)
    (id,) = submission.ids(store)
    frozen = submission.load(store, id)
    assert main(["worker", "--output", cluster.out, "--partitions", "0-59"]) == 0
    cluster.submit("--tasks", "2", "--wait")
    assert submission.load(store, id) == frozen
    assert [number for slot in range(frozen.slots) for number in frozen.slot(slot)] == list(range(MAX_ARRAY_SIZE + 6))
    for job in arrays:
        cluster.slurm.run("scontrol", "release", job)
    for job in arrays:
        assert set(cluster.slurm.wait(job).values()) == {("COMPLETED", 0)}
    cluster.check(2 * (MAX_ARRAY_SIZE + 6))


def test_a_warned_task_stops_requeues_itself_alone_and_goes_on(cluster: Cluster) -> None:
    cluster.slurm = signalling(cluster.slurm, cluster.folder / "bin")
    cluster.plan(32, 8)
    cluster.hold.at("004.tar")
    _, said = cluster.submit("--tasks", "2", "--batch-size", "2")
    (job,) = jobs(said, "embed")
    cluster.until_all_commit(2)
    cluster.until(lambda: len(status(Store(cluster.out)).workers) == 2)
    cluster.until(lambda: bool(status(Store(cluster.out)).running))
    running = status(Store(cluster.out))
    assert {worker.job for worker in running.workers} == {f"slurm {job}_0", f"slurm {job}_1"}
    assert running.images_per_second > 0
    assert running.relaunch is not None
    assert running.relaunch.startswith(f"clip-batch submit slurm --output {cluster.out} --tasks=2")
    cluster.slurm.run("scancel", "--signal=USR2", f"{job}_1")
    cluster.slurm.requeued(f"{job}_1")
    assert "Requeued job" in cluster.logs()
    cluster.hold.release()
    assert set(cluster.slurm.wait(job).values()) == {("COMPLETED", 0)}
    assert [int(cluster.slurm.job(f"{job}_{task}")[0]["Restarts"]) for task in range(2)] == [0, 1]
    cluster.check(32 * 8)


def test_preemption_a_killed_worker_and_a_dead_node(cluster: Cluster) -> None:
    cluster.plan(96, 8)
    cluster.hold.at("008.tar")
    alone = ["--gpus-per-task", "1", "--batch-size", "2", "--no-share"]  # or others do the killed one's
    (job,) = jobs(cluster.submit("--tasks", "4", *alone)[1], "embed")
    cluster.until_all_commit(4)
    urgent = cluster.slurm.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=:")
    assert cluster.slurm.wait(urgent) == {0: ("COMPLETED", 0)}
    before = frozenset(cluster.committed())
    cluster.hold.at("024.tar")
    cluster.slurm.requeued(job)
    cluster.until_all_commit(4, before)
    (worker,) = cluster.slurm.job(f"{job}_1")
    (other,) = set(NODES) - {worker["NodeList"]}
    step = f"SLURM_ARRAY_JOB_ID={job}", "SLURM_ARRAY_TASK_ID=1", "SLURM_STEP_ID=0"
    for pid in mine(cluster.slurm.folder, *step):
        os.kill(pid, signal.SIGKILL)
    cluster.slurm.kill_slurmd(other)
    try:
        for fields in cluster.slurm.job(job):
            if fields["NodeList"] == other:
                cluster.slurm.requeued(f"{job}_{fields['ArrayTaskId']}", 2)
        cluster.hold.release()
        ended = cluster.slurm.wait(job)
        assert len(cluster.committed()) < 96
        restarts = {int(fields["ArrayTaskId"]): int(fields["Restarts"]) for fields in cluster.slurm.job(job)}
    finally:
        cluster.slurm.start_slurmd(other)
    assert ended == {0: ("COMPLETED", 0), 1: ("FAILED", 137), 2: ("COMPLETED", 0), 3: ("COMPLETED", 0)}
    assert sorted(restarts.values()) == [1, 1, 2, 2], restarts
    cluster.submit("--wait", "--tasks", "2")
    cluster.check(96 * 8)


def test_a_task_signalled_before_it_listens_is_requeued(cluster: Cluster) -> None:
    cluster.slurm = signalling(cluster.slurm, cluster.folder / "bin")
    cluster.plan(2, 5)
    cluster.hold.at("")
    (job,) = jobs(cluster.submit("--tasks", "2")[1], "embed")
    element = f"SLURM_ARRAY_JOB_ID={job}", "SLURM_STEP_ID=0"
    cluster.until(lambda: all(mine(cluster.slurm.folder, *element, f"SLURM_ARRAY_TASK_ID={task}") for task in range(2)))
    for task, number in enumerate(("TERM", "USR2")):  # preemption, the time limit's warning
        cluster.slurm.run("scancel", f"--signal={number}", f"{job}_{task}")
    cluster.slurm.requeued(job)
    cluster.hold.release()
    assert set(cluster.slurm.wait(job).values()) == {("COMPLETED", 0)}, cluster.logs()
    assert {int(fields["Restarts"]) for fields in cluster.slurm.job(job)} == {1}
    cluster.check(10)


def test_cancelled_tasks_stay_cancelled(cluster: Cluster) -> None:
    cluster.plan(8, 60)
    cluster.hold.at("002.tar")
    (job,) = jobs(cluster.submit("--tasks", "1", "--batch-size", "2")[1], "embed")
    cluster.until(lambda: len(cluster.committed()) > 0)
    cluster.slurm.run("scancel", job)
    assert cluster.slurm.wait(job)[0][0] == "CANCELLED"
    assert len(cluster.committed()) < 8
    cluster.hold.release()
    cluster.submit("--wait", "--tasks", "3")
    cluster.check(8 * 60)


def test_a_merge_behind_an_incomplete_output_refuses_and_pends_for_nobody(cluster: Cluster) -> None:
    cluster.plan(3, 5)
    lost = cluster.folder / "001.tar"
    lost.rename(cluster.folder / "away")
    merge = ["--index", cluster.index, "--merge-cpus", "1", "--merge-memory", "500MB", "--merge-tasks", "1"]
    _, said = cluster.submit(*merge, "--wait", code=1)
    assert "001.tar" in said
    (embed,), (train,), (manifest,) = (jobs(said, kind) for kind in ("embed", "train", "manifest"))
    assert cluster.slurm.wait(embed)[1] == ("FAILED", 1)
    assert cluster.slurm.wait(train)[0] == ("FAILED", 1)
    assert cluster.slurm.wait(manifest)[0][0] == "CANCELLED"
    assert not os.path.exists(f"{cluster.index}/CURRENT")
    (cluster.folder / "away").rename(lost)
    cluster.submit(*merge, "--wait")
    assert main(["verify", "--index", cluster.index, "--deep"]) == 0
    cluster.check(15)


def test_two_submissions_and_a_worker_by_hand_drain_one_plan(cluster: Cluster) -> None:
    cluster.plan(12, 30)
    cluster.hold.at("004.tar")  # or nothing is missing when the second is submitted
    many = ["--nodes", "1", "--tasks-per-node", "2", "--tasks", "2", "--batch-size", "2"]
    arrays = [*jobs(cluster.submit(*many)[1], "embed"), *jobs(cluster.submit("--batch-size", "2")[1], "embed")]
    cluster.hold.release()
    assert main(["worker", "--output", cluster.out, "--slot", "0", "--slots", "1", "--batch-size", "2"]) == 0
    for job in arrays:
        assert set(cluster.slurm.wait(job).values()) == {("COMPLETED", 0)}
    cluster.check(12 * 30)
    assert main(["gc", "--output", cluster.out]) == 0
    assert len(os.listdir(f"{cluster.out}/img_emb")) == 12


def test_slurm_spark_and_a_worker_by_hand_drain_one_plan(cluster: Cluster) -> None:
    cluster.plan(60, 8)
    cluster.hold.at("000.tar", after=10)
    spark = local_cluster(cluster.folder / "spark", installed(), cluster.hold.env["PYTHONPATH"])
    driver = spark.submit("--output", cluster.out, "--tasks", "60", "--device", "cpu", "--batch-size", "2")
    by_hand = ["worker", "--output", cluster.out, "--slot", "0", "--slots", "1", "--batch-size", "2"]
    environment = {**os.environ, **cluster.hold.env}
    worker = subprocess.Popen([sys.executable, "-m", "clip_batch", *by_hand], env=environment)
    (job,) = jobs(cluster.submit("--tasks", "1", "--batch-size", "2")[1], "embed")
    cluster.until(lambda: committers(cluster) == {"spark", "slurm", ""})
    assert len(cluster.committed()) < 60
    cluster.hold.release()
    assert worker.wait() == 0
    finish(driver)
    assert cluster.slurm.wait(job) == {0: ("COMPLETED", 0)}
    cluster.check(60 * 8)


def committers(cluster: Cluster) -> set[str]:
    """Who started the workers that have committed something."""
    return {record.job.partition(" ")[0] for record in read_records(Store(cluster.out)) if record.committed}


def test_every_option_reaches_the_script_and_sbatch_takes_it(cluster: Cluster) -> None:
    cluster.plan(3, 2)
    plain = ["--account", "lab", "--qos", "low", "--nodelist", "n1", "--exclude", "n2", "--comment", "a b"]
    mail = ["--mail-user", "me@example.org", "--mail-type", "END", "--sbatch", '{"nice": 5}', "--no-requeue"]
    node = ["--gres", "gpu:1", "--exclusive", "--cpus-per-task", "3", "--tasks-per-node", "2", "--setup", "true a", "b"]
    shown, _ = cluster.submit(*plain, *mail, *node, "--tasks", "2", "--concurrency", "1", "--dry-run")
    wanted = ["account=lab", "qos=low", "nodelist=n1", "exclude=n2", "comment='a b'", "mail-user=me@example.org"]
    wanted += ["mail-type=END", "nice=5", "no-requeue", "gres=gpu:1", "exclusive", "cpus-per-task=3", "time=20"]
    wanted += ["ntasks-per-node=2", "array=0-1%1", "signal=USR2@30", "mem=500M", "open-mode=append"]
    assert {f"#SBATCH --{flag}" for flag in wanted} <= set(shown.splitlines())
    assert "\ntrue a\nb\n" in shown
    script = cluster.folder / "script.sh"
    script.write_text(shown)
    cluster.slurm.run("sbatch", "--test-only", str(script))
    image = ["--container-image", "/x.sif", "--container-mounts", "/data,/shared:/s", "--gpus-per-task", "1"]
    shown, _ = cluster.submit("--container", "apptainer", *image, "--dry-run")
    assert "apptainer exec --nv --bind /data --bind /shared:/s /x.sif python3 -u -m submitit" in shown
    shown, _ = cluster.submit("--container", "pyxis", *image, "--container-python", "py", "--dry-run")
    assert "--container-image=/x.sif --container-mounts=/data,/shared:/s py -u -m submitit" in shown


def test_what_sbatch_refuses_is_one_line(cluster: Cluster) -> None:
    cluster.plan(1, 2)
    _, said = cluster.submit("--slurm-partition", "nowhere", code=2)
    assert "invalid partition" in said.lower()
    assert len(said.strip().splitlines()) == 1
    assert main(["worker", "--output", cluster.out, "--submission", "20200101-000000-000000", "--slot", "0"]) == 2


def test_the_doctor_looks_at_a_compute_node(cluster: Cluster) -> None:
    cluster.plan(1, 2)
    command = [sys.executable, "-m", "clip_batch", "doctor", "--output", cluster.out, "--json"]
    found = {}
    for where in ([], ["--on-node", "--gpus-per-task", "1"]):
        done = subprocess.run([*command, *where], env=cluster.slurm.env, capture_output=True, text=True)
        found[bool(where)] = {check["name"]: check for check in json.loads(done.stdout)}
    assert f"MaxArraySize {MAX_ARRAY_SIZE}" in found[False]["slurm"]["message"]
    assert "2 nodes, gpu:2" in found[False]["slurm debug"]["message"]
    assert "model" not in found[False]
    on_node = found[True]
    assert all(on_node[name]["ok"] for name in ("put-if-absent", "plan", "weights", "model", "clock", "slurm"))
    assert on_node["gpu"]["ok"] is False  # these GPUs are pretended
    assert "SLURM gave this job GPU 0" in on_node["gpu"]["message"]
    assert done.returncode == 1
    done = subprocess.run(
        [*command, "--calibrate", "--on-node", "--cpus-per-task", "1", "--device", "cpu"],
        env=cluster.slurm.env,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout)["measured"]["threads"] == 1, done.stderr


def test_without_slurm_it_says_so(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.plan(1, 2)
    monkeypatch.setenv("PATH", str(cluster.folder))
    assert main(["submit", "slurm", "--output", cluster.out]) == 2
