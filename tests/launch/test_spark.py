"""Spark: the command line, what a task does, and whole runs on real executors that are killed and raced."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from clip_batch.cli import main, spark_driver
from clip_batch.config import EmbedConfig, SparkConfig, StorageConfig
from clip_batch.demo import data
from clip_batch.embeddings import submission
from clip_batch.embeddings.commits import committed, read_commit
from clip_batch.embeddings.embed import Outcome
from clip_batch.embeddings.workers import read_records
from clip_batch.errors import ConfigError, IncompleteError
from clip_batch.launch import spark, spark_executor
from clip_batch.launch.spark_executor import EmbedTask, PartitionStatus, embed_slot, pin
from clip_batch.plan.plan import load_plan
from clip_batch.storage.store import Store
from tests import ROOT, corpus
from tests.servers import spark_cluster
from tests.servers.spark_cluster import Spark, finish, until


def test_the_command_line() -> None:
    config = SparkConfig(
        "yarn", "cluster", properties_file="my.conf", archives="env.tar.gz#environment", spark_submit="true"
    )
    words = spark.command(config, ["--output", "OUT"])
    assert words == [
        *("true", "--master", "yarn", "--deploy-mode", "cluster", "--name", "clip-batch"),
        *("--properties-file", "my.conf", "--archives", "env.tar.gz#environment"),
        *("--conf", "spark.pyspark.python=./environment/bin/python", spark.DRIVER, "--output", "OUT"),
    ]
    assert Path(spark.DRIVER).exists()


@pytest.mark.parametrize(
    ("config", "driver", "executors"),
    [
        (SparkConfig(), sys.executable, sys.executable),
        (SparkConfig("spark://host:7077"), sys.executable, sys.executable),
        (SparkConfig("local-cluster[2,1,1024]"), sys.executable, sys.executable),
        (SparkConfig("yarn"), sys.executable, None),
        (SparkConfig("yarn", archives="/tmp/env.tar.gz"), sys.executable, "./env.tar.gz/bin/python"),
        (SparkConfig("k8s://https://host", "cluster"), None, None),
        (SparkConfig("yarn", spark_conf={"spark.pyspark.python": "/opt/python"}), sys.executable, "/opt/python"),
    ],
)
def test_which_python_runs(config: SparkConfig, driver: str | None, executors: str | None) -> None:
    text = " ".join(spark.command(config, []))
    for key, wanted in (("spark.pyspark.driver.python", driver), ("spark.pyspark.python", executors)):
        assert re.findall(rf"--conf {key}=(\S+)", text) == ([wanted] if wanted else [])


def test_properties_are_written_as_spark_reads_them() -> None:
    words = spark.command(SparkConfig(spark_conf={"spark.speculation": True, "spark.cores.max": 4}), [])
    assert {"spark.speculation=true", "spark.cores.max=4"} <= set(words)


def test_spark_submit_is_found_where_pyspark_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    pytest.importorskip("pyspark")
    assert os.access(spark.command(SparkConfig(), [])[0], os.X_OK)
    with pytest.raises(ConfigError, match="--spark-submit"):
        spark.submit(spark.command(SparkConfig(spark_submit="no/such/spark-submit"), []))


def test_submit_gives_the_code_and_no_other_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_BATCH_THREADS", "3")
    monkeypatch.setenv(spark.STORAGE, "{}")
    assert spark.submit(["sh", "-c", f'[ -z "$CLIP_BATCH_THREADS" ] && [ "${spark.STORAGE}" = "{{}}" ] && exit 7']) == 7


@pytest.mark.parametrize(
    ("master", "wanted"), [("local", 1), ("local[4]", 1), ("local[*, 3]", 3), ("spark://h:7077", 8), ("yarn", 8)]
)
def test_how_often_spark_tries(master: str, wanted: int) -> None:
    assert spark._tries(SimpleNamespace(master=master, getConf=lambda: {"spark.task.maxFailures": "8"})) == wanted


def test_a_driver_that_is_told_too_little_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert spark_driver.main([]) == 2
    assert "--output" in capsys.readouterr().err
    assert spark_driver.main(["--output", "nowhere"]) == 2
    assert "no plan" in capsys.readouterr().err


def test_cuda_sees_the_gpu_of_the_task_and_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    pin(["3"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    pin(["3"])
    with pytest.raises(ConfigError, match=r"GPU 3 was given GPU 5: set spark\.executor\.resource\.gpu\.amount=1"):
        pin(["5"])


def make_plan(folder: Path, tars: int, samples: int, side: int = 32) -> str:
    """A plan of `tars` partitions, a tar each; OUT."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(tars):
        corpus.good_tar(str(folder / f"{number:03d}.tar"), samples, seed=number, side=side)
    out = str(folder / "out")
    flags = ["--input", f"{folder}/*.tar", "--model", "fake:8", "--partition-samples", str(samples)]
    assert main(["plan", *flags, "--output", out]) == 0
    return out


def check_every_row_once(out: str) -> None:
    """`verify --deep`, and the keys of the committed metadata are the tars', in order."""
    assert main(["verify", "--output", out, "--deep"]) == 0
    store = Store(out)
    for number, partition in enumerate(load_plan(store).partitions):
        commit = read_commit(store, f"{number:04d}")
        keys = [key for piece in partition.slices for key in corpus.tar_keys(piece.shard.url)]
        assert pq.read_table(store.path(commit.file("metadata") or ""))["key"].to_pylist() == keys
        assert np.load(store.path(commit.file("img_emb") or "")).shape == (len(keys), 8)


# ---- one task, without Spark


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the one slot of three partitions as attempt `attempt` of 4; (OUT, the runner)."""
    pyspark = pytest.importorskip("pyspark")
    out = make_plan(tmp_path, 3, 4)
    frozen = submission.draft([0, 1, 2], "spark", 1, 1, "")

    def run(attempt: int) -> list[PartitionStatus]:
        context = SimpleNamespace(attemptNumber=lambda: attempt, resources=dict, cpus=lambda: 1)
        monkeypatch.setattr(pyspark.TaskContext, "get", lambda: context)
        work = EmbedTask(out, frozen, EmbedConfig(device="cpu"), StorageConfig(), "app", 4)
        return [PartitionStatus(**row) for row in embed_slot(work, [0], 0)]

    return out, run


def test_a_task_tells_of_every_partition_whoever_committed_it(task: Any) -> None:
    out, run = task
    assert main(["worker", "--output", out, "--partitions", "1"]) == 0
    first, again = run(0), run(1)
    assert first[0].partition == 1
    assert sorted(first, key=lambda status: status.partition) == again
    assert [(status.partition, status.state, status.rows) for status in again] == [
        (number, "committed", 4) for number in range(3)
    ]


def test_what_is_not_the_datas_fault_raises_but_not_to_the_end(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out, run = task
    real = spark_executor.embed

    def embed(out: str, config: Any, todo: list[int], **rest: Any) -> list[Outcome]:
        unsound = Outcome(1, "failed", error="OSError: disk full", again=True)
        return [*real(out, config, [number for number in todo if number != 1], **rest), unsound]

    monkeypatch.setattr(spark_executor, "embed", embed)
    for attempt in (0, 1):
        with pytest.raises(RuntimeError, match="partition 1: OSError: disk full"):
            run(attempt)
        assert committed(Store(out)) == {0, 2}
    status = {status.partition: status for status in run(2)}[1]
    assert (status.state, status.error, status.again) == ("failed", "OSError: disk full", True)
    monkeypatch.setattr(spark_executor, "embed", real)
    last = {status.partition: status for status in run(3)}
    assert "3 attempts died" in last[1].error
    assert last[0].state == last[2].state == "committed"
    assert all(status.state == "committed" for status in run(0))


def test_slots_at_fault_run_again_while_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make_plan(tmp_path, 4, 2)
    frozen = submission.draft([0, 1, 2, 3], "spark", 4, 1, "")
    submission.publish(Store(out), frozen)
    sound = iter([{0}, {0, 1}, {0, 1}])
    asked = []

    def fake(session: Any, task: Any, count: int) -> list[dict[str, Any]]:
        slots, good = task.args[1], next(sound)
        asked.append(list(slots))
        return [
            vars(PartitionStatus(slot, "committed" if slot in good else "failed", again=slot != 3)) for slot in slots
        ]

    monkeypatch.setattr(spark, "_map", fake)
    context = SimpleNamespace(master="yarn", applicationId="app", getConf=dict, setJobDescription=str)
    statuses = spark.drain(SimpleNamespace(sparkContext=context), out, frozen.id, EmbedConfig())
    assert [status.state for status in statuses] == ["committed", "committed", "failed", "failed"]
    assert asked == [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2]]


def test_a_job_that_spark_aborts_is_one_line(tmp_path: Path) -> None:
    error = pytest.importorskip("pyspark.errors").PySparkException("Job aborted:\n\tno module named clip_batch")

    def abort() -> None:
        raise error

    frame = SimpleNamespace(collect=abort)
    session = SimpleNamespace(range=lambda *_: SimpleNamespace(mapInArrow=lambda *_: frame))
    with pytest.raises(IncompleteError, match=r"aborted the job: Job aborted: no module named clip_batch .*run it"):
        spark._map(session, str, 1)


# ---- real executors


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spark]:
    with spark_cluster.standalone(tmp_path_factory.mktemp("spark"), spark_cluster.installed()) as started:
        yield started


@pytest.mark.slow
def test_the_whole_chain_on_the_demo_set_in_an_environment_from_an_archive(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\ntouch {tmp_path}/used\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    with tarfile.open(tmp_path / "env.tar.gz", "w:gz") as packed:
        packed.add(script, "bin/python")
    local = spark_cluster.local_cluster(tmp_path / "spark", spark_cluster.installed())
    out, index = str(tmp_path / "out"), str(tmp_path / "index")
    tars = data.write_tars(str(tmp_path / "tars"), 4)
    assert main(["plan", "--input", *tars, "--model", "demo", "--partition-samples", "160", "--output", out]) == 0
    chain = ["--output", out, "--index", index, "--shard-rows", "700", "--device", "cpu"]
    text = local.run(*chain, archives=f"{tmp_path}/env.tar.gz#environment")
    assert (tmp_path / "used").exists()
    assert "12 of 12 partitions committed, 1,911 samples embedded, 0 listed as failed" in text
    assert "merged 1,911 rows into 3 index shards" in text
    assert main(["verify", "--output", out, "--deep"]) == 0
    assert main(["verify", "--index", index, "--deep"]) == 0
    loads = [log.count("loads demo on cpu") for log in local.logs().values()]
    assert len(loads) == 2
    assert max(loads) == 1


@pytest.mark.slow
def test_the_whole_chain_on_spark_3_5(tmp_path: Path) -> None:
    folder = Path(os.environ.get("SPARK35", ROOT / ".spark35"))
    if not (folder / "pyspark").is_dir():
        pytest.skip(f"no Spark 3.5 in {folder}: make spark35")
    old = spark_cluster.local_cluster(tmp_path / "spark", folder / "pyspark", str(folder))
    out, index = make_plan(tmp_path / "tars", 5, 10), str(tmp_path / "index")
    text = old.run("--output", out, "--index", index, "--device", "cpu", spark__log__level="INFO")
    assert "Running Spark version 3.5" in text
    assert "5 of 5 partitions committed, 50 samples embedded" in text
    check_every_row_once(out)
    assert main(["verify", "--index", index, "--deep"]) == 0


@pytest.mark.slow
def test_bad_data_is_a_row_and_credentials_are_nowhere(cluster: Spark, tmp_path: Path) -> None:
    out = make_plan(tmp_path / "tars", 4, 5)
    poison, gone = tmp_path / "tars" / "001.tar", tmp_path / "tars" / "002.tar"
    found = poison.stat()
    poison.write_bytes(bytes(found.st_size))
    os.utime(poison, ns=(found.st_atime_ns, found.st_mtime_ns))  # as a disk that loses its content does
    gone.rename(tmp_path / "kept.tar")
    events = tmp_path / "events"
    events.mkdir()
    env = {spark.STORAGE: json.dumps({"secret": "s3cr3t-v4lue"})}
    conf = {"spark__eventLog__enabled": True, "spark__eventLog__compress": False, "spark__ui__enabled": True}
    conf["spark__eventLog__dir"] = str(events)
    index = str(tmp_path / "index")
    flags = ["--output", out, "--index", index, "--device", "cpu"]
    text = cluster.run(*flags, code=1, env=env, spark__log__level="INFO", **conf)
    assert re.search(rf"partition 2 failed: InputError: cannot read {gone}", text)
    assert "3 of 4 partitions committed, 10 samples embedded, 1 listed as failed" in text
    assert f"{out} lacks partitions 2 of 4" in text
    assert not os.path.exists(f"{index}/CURRENT")
    (tmp_path / "kept.tar").rename(gone)
    assert main(["worker", "--output", out, "--partitions", "2"]) == 0
    assert main(["verify", "--output", out, "--deep"]) == 0
    logged = "".join(
        [*(path.read_text(errors="replace") for path in events.rglob("*") if path.is_file()), *cluster.logs().values()]
    )
    assert "clip-batch embed" in logged
    assert "s3cr3t-v4lue" not in logged + text


FAULTS = """
import os, pathlib, signal, time
from clip_batch.encoders.families import fake

real, seen = fake.FakeEncoder.encode_texts, pathlib.Path(__file__).with_name("seen")

def encode_texts(self, texts):
    fault = os.environ["FAULT"]
    if fault == "slow":
        time.sleep(0.1)
    if fault == "poison" and texts[0].endswith("of tar 1"):
        os.kill(os.getpid(), signal.SIGKILL)
    if fault in ("once", "straggler") and texts[0].endswith("of tar 2") and not seen.exists():
        seen.touch()
        if fault == "straggler":
            time.sleep(300)
        raise RuntimeError("CUDA error: the device fell off the bus")
    return real(self, texts)

fake.FakeEncoder.encode_texts = encode_texts
"""


def faulty(folder: Path, fault: str) -> dict[str, Any]:
    """The properties of executors whose Python has a fault."""
    (folder / "sitecustomize.py").write_text(FAULTS)
    return {"spark__executorEnv__PYTHONPATH": str(folder), "spark__executorEnv__FAULT": fault}


@pytest.mark.slow
def test_a_process_that_dies_of_its_partition_takes_no_other_with_it(cluster: Spark, tmp_path: Path) -> None:
    out = make_plan(tmp_path / "tars", 6, 5)
    text = cluster.run("--output", out, "--device", "cpu", code=1, **faulty(tmp_path, "poison"))
    assert "5 of 6 partitions committed" in text
    assert "partition 1 failed: RuntimeError: 3 attempts died" in text
    assert committed(Store(out)) == {0, 2, 3, 4, 5}
    assert main(["worker", "--output", out, "--partitions", "1"]) == 0
    check_every_row_once(out)


@pytest.mark.slow
def test_killed_executors_and_python_workers(cluster: Spark, tmp_path: Path) -> None:
    out = make_plan(tmp_path / "tars", 6, 30)
    conf = faulty(tmp_path, "slow")
    process = cluster.submit("--output", out, "--device", "cpu", "--batch-size", "1", **conf)
    until(lambda: committed(Store(out)) or process.poll() is not None, 90)
    time.sleep(1)  # into the next partition: each takes three seconds
    os.kill(spark_cluster.python_workers(cluster)[0], signal.SIGKILL)
    before = committed(Store(out))
    until(lambda: committed(Store(out)) > before or process.poll() is not None, 90)
    time.sleep(1)
    os.kill(spark_cluster.executors(cluster)[0], signal.SIGKILL)
    text = finish(process)
    assert "6 of 6 partitions committed" in text
    assert "Python worker exited unexpectedly" in text
    assert "ExecutorLostFailure" in text
    check_every_row_once(out)
    assert main(["gc", "--output", out]) == 0


@pytest.mark.slow
def test_a_straggler_is_overtaken_by_a_speculative_attempt(cluster: Spark, tmp_path: Path) -> None:
    out = make_plan(tmp_path / "tars", 4, 5)
    conf = {
        **faulty(tmp_path, "straggler"),
        "spark__speculation": True,
        "spark__speculation__interval": "100ms",
        "spark__speculation__multiplier": "1.1",
        "spark__speculation__quantile": "0.1",
        "spark__speculation__efficiency__enabled": False,
    }
    assert "4 of 4 partitions committed" in cluster.run("--output", out, "--device", "cpu", **conf)
    jobs = [record.job.partition(" slot ")[2] for record in read_records(Store(out))]
    assert sorted(job for job in jobs if job.startswith("2 ")) == ["2 attempt 0", "2 attempt 1"]
    check_every_row_once(out)


@pytest.mark.slow
def test_two_drivers_and_a_worker_drain_one_plan(cluster: Spark, tmp_path: Path) -> None:
    out = make_plan(tmp_path / "tars", 12, 100, side=64)
    flags = ["--output", out, "--device", "cpu", "--batch-size", "4"]
    drivers = [cluster.submit(*flags, spark__cores__max=1) for _ in range(2)]
    until(lambda: committed(Store(out)), 90)
    worker = [sys.executable, "-m", "clip_batch", "worker", *flags, "--slot", "0", "--slots", "1"]
    assert subprocess.run(worker, capture_output=True).returncode == 0
    for driver in drivers:
        assert "12 of 12 partitions committed, 1,200 samples embedded" in finish(driver)
    check_every_row_once(out)


@pytest.mark.slow
def test_the_gpu_that_spark_assigned_is_the_one_that_cuda_sees_and_may_fail_once(
    cluster: Spark, tmp_path: Path
) -> None:
    before = set(cluster.logs())
    out = make_plan(tmp_path / "tars", 6, 3)
    conf = {"spark__executor__resource__gpu__amount": 1, "spark__task__resource__gpu__amount": 1}
    text = cluster.run("--output", out, "--tasks", "3", **conf, **faulty(tmp_path, "once"))
    assert "6 of 6 partitions committed" in text
    assert "RuntimeError: partition 2: RuntimeError: CUDA error: the device fell off the bus" in text
    loads = []
    for name, log in cluster.logs().items():
        if name not in before:
            address = spark_cluster.GPUS[re.findall(r'"--hostname" "(.*?)"', log)[0]]
            found = re.findall(r"process (\d+) loads fake:8 on cuda:0, CUDA_VISIBLE_DEVICES=(\d+)", log)
            assert {shown for _, shown in found} <= {address}
            loads += [process for process, _ in found]
    assert loads
    assert len(loads) == len(set(loads))
    assert {record.gpus for record in read_records(Store(out))} == {1}
    check_every_row_once(out)


def test_the_discovery_script_speaks_sparks_json(tmp_path: Path) -> None:
    script = ROOT / "spark" / "discover-gpus.sh"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0\necho 1\n")
    tool.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for shown, wanted in ((None, ["0", "1"]), ("4,7", ["4", "7"])):
        env = {"PATH": path, **({"CUDA_VISIBLE_DEVICES": shown} if shown else {})}
        done = subprocess.run([script], env=env, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == {"name": "gpu", "addresses": wanted}
