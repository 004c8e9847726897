"""The whole line with input, OUT and INDEX on servers of S3 and GCS and a real HDFS, with faults, races and kills."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from clip_batch.config import MergeConfig, PlanConfig, StorageConfig
from clip_batch.embeddings.commits import committed, read_commits
from clip_batch.embeddings.embed import embed
from clip_batch.embeddings.repair import gc
from clip_batch.embeddings.verify import verify_output
from clip_batch.errors import ConfigError
from clip_batch.index.merge.merge import merge
from clip_batch.index.paths import CURRENT
from clip_batch.index.verify import verify_index
from clip_batch.launch.doctor import doctor
from clip_batch.plan import paths
from clip_batch.plan.plan import make_plan
from clip_batch.storage import retry
from clip_batch.storage.paths import TEMPORARY
from clip_batch.storage.store import Store
from tests import corpus
from tests.servers import serving
from tests.servers.gcs_server import gcs as gcs
from tests.servers.gcs_server import gcs_server as gcs_server
from tests.servers.gcs_server import hurry
from tests.servers.hdfs_cluster import Hdfs
from tests.servers.proxy import Proxied
from tests.servers.s3_server import SECRET
from tests.servers.s3_server import s3 as s3
from tests.servers.s3_server import s3_server as s3_server

pytestmark = pytest.mark.slow

RACERS = """
import os, sys
import numpy, pyarrow.parquet, torch  # once for all, so that they race
from clip_batch.cli import main
children = []
for number in range(8):
    child = os.fork()
    if not child:
        sys.stdout = open(f"{sys.argv[1]}/{number}", "w")
        code = main(sys.argv[2:])
        sys.stdout.flush()
        os._exit(code)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


@dataclass(frozen=True)
class Place:
    """Where a test works: a folder of some store, and what commands need to reach it."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)
    server: Proxied = field(default_factory=Proxied)

    @property
    def storage(self) -> StorageConfig:
        return StorageConfig(self.options)

    def store(self, name: str) -> Store:
        return Store(f"{self.url}/{name}", self.options)

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "CLIP_BATCH_STORAGE_OPTIONS": json.dumps(self.options)}

    def put_tars(self, folder: Path, count: int, samples: int) -> None:
        """`count` tars of `samples` samples in `tars`."""
        for number in range(count):
            path = corpus.good_tar(str(folder / f"{number:05d}.tar"), samples, seed=number)
            self.store("tars").replace(f"{number:05d}.tar", Path(path).read_bytes())

    def plan(self, samples: int) -> None:
        """Plan the tars into partitions of so many samples."""
        config = PlanConfig([f"{self.url}/tars/*.tar"], model="fake:8", partition_samples=samples)
        make_plan(config.input, f"{self.url}/out", config, storage=self.storage)

    def run(self, *arguments: str, code: int = 0, before: tuple[str, ...] = ()) -> str:
        """Standard output of a command that must end with `code`."""
        command = [*before, sys.executable, "-m", "clip_batch", *arguments]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=240)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr


@pytest.fixture(params=["local", "s3", "gcs", "hdfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    if request.param == "local":
        return Place(str(tmp_path / "place"))
    if request.param in ("s3", "gcs"):
        server: Proxied = request.getfixturevalue(request.param)
        return Place(f"{server.bucket}/{uuid.uuid4().hex}", server.options, server)
    # What S3 is told in the same configuration is not for HDFS.
    options = {"s3": {"secret": SECRET}, "dfs.replication": 1}
    return Place(f"{request.getfixturevalue('hdfs').url}/{uuid.uuid4().hex}", options)


@pytest.fixture
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.05)
    hurry(monkeypatch)


@pytest.mark.parametrize("place", ["s3", "gcs", "hdfs"], indirect=True)
def test_the_whole_line(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.put_tars(tmp_path, 4, 25)
    out, index = f"{place.url}/out", f"{place.url}/index"
    place.store("").replace("inputs.txt", f"# a list of patterns\n{place.url}/tars/*.tar\n".encode())
    listed = f"@{place.url}/inputs.txt"
    place.run("plan", "--input", listed, "--model", "fake:16", "--partition-samples", "20", "--output", out)
    place.run("embed", "--output", out)
    assert json.loads(place.run("verify", "--output", out, "--deep", "--json"))["rows"] == 100
    assert gc(place.store("out")) == []
    place.run("merge", "--output", out, "--index", index, "--shard-rows", "40")
    assert verify_index(place.store("index"), deep=True).ok
    search = ("search", "--index", index, "--text", "caption 7 of tar 2", "--modality", "text", "--json")
    assert json.loads(place.run(*search))[0]["metadata"]["key"] == "002000007"
    monkeypatch.setenv("CLIP_BATCH_STORAGE_OPTIONS", place.env["CLIP_BATCH_STORAGE_OPTIONS"])
    with serving.running({"all": index}) as url:
        asked = {"text": "caption 7 of tar 2", "modality": "text", "num_images": 1, "indice_name": "all"}
        knn = Request(f"{url}/knn-service", json.dumps(asked).encode(), {"Content-Type": "application/json"})
        assert json.load(urlopen(knn, timeout=60))[0]["key"] == "002000007"
    checks = {check.name: check.ok for check in doctor(out, place.storage)}
    assert all(checks[name] for name in ("put-if-absent", "read-after-write", "removal", "clock", "plan"))
    store = place.store("")
    stored = {name: store.read(name) for name in corpus.names_in(store) if not name.startswith("tars/")}
    assert not [name for name in stored if TEMPORARY in name]
    assert any(name.endswith("plan.parquet") for name in stored)
    assert not [name for name, data in stored.items() if SECRET.encode() in data], "credentials are written nowhere"


def test_of_eight_racing_workers_one_commits(place: Place, tmp_path: Path) -> None:
    place.put_tars(tmp_path, 1, 20)
    place.plan(20)
    said = tmp_path / "said"
    said.mkdir()
    command = [sys.executable, "-c", RACERS, str(said), "worker", "--output", f"{place.url}/out", "--partitions", "0"]
    race = subprocess.run([*command, "--json"], env=place.env, capture_output=True, text=True, timeout=240)
    assert race.stdout == f"{[0] * 8}\n", race.stderr
    states = [one["state"] for file in said.iterdir() for one in json.loads(file.read_text())]
    assert states.count("committed") == 1
    assert set(states) <= {"committed", "lost"}
    store = place.store("out")
    [commit] = read_commits(store).values()
    named = set(commit.files)
    assert {name for name in corpus.names_in(store) if not name.startswith(paths.HOME)} == {
        name for name in named if not name.startswith(paths.HOME)
    }, "losers removed their files"
    assert verify_output(store, deep=True, options=place.options).ok


@contextlib.contextmanager
def reading(place: Place) -> Iterator[list[str]]:
    """Reads OUT and INDEX all the while; the list is what was wrong."""
    wrong: list[str] = []
    stop = threading.Event()

    def look() -> None:
        out, index = place.store("out"), place.store("index")
        while not stop.is_set():
            with contextlib.suppress(OSError, RuntimeError):  # the faults are for readers too
                for commit in read_commits(out).values():
                    for name, file in commit.files.items():
                        data = out.read(name)
                        if (len(data), hashlib.sha256(data).hexdigest()) != (file["bytes"], file["sha256"]):
                            wrong.append(name)
                with contextlib.suppress(ConfigError):  # no index yet
                    found = verify_index(index).problems
                    if "is behind the log" in found.get(CURRENT, ""):  # a version is going live just now
                        del found[CURRENT]
                    if found:
                        wrong.append(str(found))
            stop.wait(0.05)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield wrong
    finally:
        stop.set()
        thread.join()


def again(work: Callable[[], bool], times: int = 8) -> None:
    """Relaunch until it has done all, as a person would; AssertionError after so many."""
    for _ in range(times):
        with contextlib.suppress(OSError):
            if work():
                return
    raise AssertionError("not done")


def embedded(place: Place) -> bool:
    """One launch of embed; whether all is committed after it."""
    return all(outcome.state != "failed" for outcome in embed(f"{place.url}/out", storage=place.storage))


@pytest.mark.usefixtures("_hurry")
@pytest.mark.parametrize("place", ["s3", "gcs"], indirect=True)
def test_with_faults_at_random(place: Place, tmp_path: Path) -> None:
    place.put_tars(tmp_path, 4, 10)
    place.plan(10)
    out, index = f"{place.url}/out", f"{place.url}/index"
    with reading(place) as wrong:
        with place.server.fault("expired", lambda method, path: method in ("PUT", "POST")):
            outcomes = embed(out, storage=place.storage)
        assert [outcome.state for outcome in outcomes] == ["failed"] * 3, "the third in a row ends the worker"
        assert all("renew the credentials" in outcome.error for outcome in outcomes)
        assert not any(SECRET in outcome.error for outcome in outcomes)
        assert committed(place.store("out")) == set()
        with contextlib.ExitStack() as faults:
            on = [
                faults.enter_context(place.server.fault(kind, share=0.06, seconds=0.05))
                for kind in ("slow down", "internal", "reset", "lost", "delay")
            ]
            again(lambda: embedded(place))
            again(lambda: bool(merge(out, index, MergeConfig(shard_rows=20), storage=place.storage)))
            assert all(fault.hits for fault in on)
        assert not wrong
    assert verify_output(place.store("out"), deep=True, options=place.options).ok
    assert verify_index(place.store("index"), deep=True).ok


@pytest.mark.usefixtures("_hurry")
@pytest.mark.parametrize("place", ["hdfs"], indirect=True)
def test_hdfs_whose_nodes_die_meanwhile(place: Place, hdfs: Hdfs, tmp_path: Path) -> None:
    place.put_tars(tmp_path, 4, 10)
    place.plan(10)
    out, index = f"{place.url}/out", f"{place.url}/index"
    with reading(place) as wrong:
        launch = threading.Thread(target=again, args=(lambda: embedded(place),))
        launch.start()
        while not any(TEMPORARY in name for name in place.store("out").list("img_emb")) and launch.is_alive():
            time.sleep(0.005)
        hdfs.kill_datanode()
        hdfs.start_datanode()
        launch.join()
        hdfs.kill_namenode()
        launch = threading.Thread(
            target=again, args=(lambda: bool(merge(out, index, MergeConfig(shard_rows=20), storage=place.storage)),)
        )
        launch.start()
        hdfs.start_namenode()
        launch.join()
        assert not wrong
    assert verify_output(place.store("out"), deep=True, options=place.options).ok
    assert verify_index(place.store("index"), deep=True).ok


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_full_disk_fails_partitions_and_nothing_else(place: Place, tmp_path: Path) -> None:
    place.put_tars(tmp_path, 2, 20)
    place.plan(20)
    store = place.store("out")
    limited = ("bash", "-c", 'ulimit -f 1; exec "$@"', "bash")
    told = place.run("embed", "--output", store.url, "--no-progress", code=1, before=limited)
    assert "File too large" in told
    assert store.list("img_emb") == []
    assert committed(store) == set()
    place.run("embed", "--output", store.url)
    assert verify_output(store, deep=True, options=place.options).ok
