"""A store on a NameNode and a DataNode of HDFS, which are killed and restarted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from clip_batch.storage.filesystem import filesystem
from clip_batch.storage.paths import TEMPORARY
from clip_batch.storage.store import Store
from tests import corpus
from tests.servers.hdfs_cluster import Hdfs

pytestmark = pytest.mark.slow

WRITE = """
import sys
from clip_batch.storage.store import Store
store = Store(sys.argv[1])
store.replace("started", b"")
with store.writer("large") as file:
    file.truncate(2**30)
"""

HALF = """
import sys, time
from hdfs_native import Client, WriteOptions
file = Client(sys.argv[1]).create(sys.argv[2], WriteOptions())
file.write(b"half")
print("open", flush=True)
time.sleep(60)
"""


@pytest.fixture
def store(hdfs: Hdfs) -> Store:
    return Store(f"{hdfs.url}/{uuid.uuid4().hex}")


def test_files_come_and_go(store: Store) -> None:
    assert store.list("") == []
    for name in ("a/b", "a/c #1?x=[y].json"):
        store.replace(name, b"old")
        store.replace(name, b"0123456789")
        assert (store.read(name), store.size(name)) == (b"0123456789", 10)
    assert store.list("a") == ["b", "c #1?x=[y].json"]
    assert corpus.names_in(store) == ["a/b", "a/c #1?x=[y].json"]
    with store.open("a/b") as file:
        assert (file.seek(-3, os.SEEK_END), file.read(2), file.tell()) == (7, b"78", 9)
    assert store._fs.cat_file(store._at("a/b"), 2, -1) == b"2345678"
    assert store.digest("a/b") == "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    with store.fetch("a/b") as path, open(path, "rb") as copy:
        assert copy.read() == b"0123456789"
    store.rename("a/b", "new/d")
    store.rename("a/b", "new/d")
    store.rename("new/d", "a/c #1?x=[y].json")
    with pytest.raises(FileNotFoundError) as caught:
        store.read("new/d")
    assert "\n" not in str(caught.value)
    store.remove("a/b")
    store.remove_folder("a")
    assert store.list("a") == []
    assert not store.exists("a")


def test_properties_are_hadoops_and_the_rest_is_for_others(hdfs: Hdfs) -> None:
    fs, path = filesystem(f"{hdfs.url}/x#y", {"key": "secret", "dfs.replication": 1, "hdfs": {"dfs.client.x": True}})
    assert path == "/x#y"
    properties = {name: value for name, value in fs.storage_options.items() if name not in ("host", "port")}
    assert properties == {"dfs.replication": "1", "dfs.client.x": "True"}


def test_one_of_many_racing_creators_wins_and_no_reader_sees_less(store: Store) -> None:
    seen = set()
    with ThreadPoolExecutor(9) as pool:
        futures = [pool.submit(store.create, "commit", b"%09d" % number, check_first=False) for number in range(24)]
        while not all(future.done() for future in futures):
            if store.exists("commit"):
                seen.add(store.read("commit"))
    won = [number for number, future in enumerate(futures) if future.result()]
    assert seen | {store.read("commit")} == {b"%09d" % won[0]}
    assert len(won) == 1
    assert store.list("") == ["commit"]


def test_a_writer_that_dies_publishes_nothing(store: Store, hdfs: Hdfs) -> None:
    at = store._at("")
    with subprocess.Popen(
        [sys.executable, "-c", HALF, hdfs.url, f"{at}/.commit{TEMPORARY}1"], stdout=subprocess.PIPE
    ) as dying:
        assert dying.stdout and dying.stdout.readline()
        dying.send_signal(signal.SIGKILL)
    assert store.list("") == [f".commit{TEMPORARY}1"]
    assert store.create("commit", b"whole")
    assert store.read("commit") == b"whole"


def test_a_large_write_killed_half_way_publishes_nothing(store: Store) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITE, store.url]) as dying:
        until = time.monotonic() + 60
        while not any(TEMPORARY in name for name in store.list("")):
            assert time.monotonic() < until and dying.poll() is None
            time.sleep(0.01)
        dying.send_signal(signal.SIGKILL)
    assert not store.exists("large")


def test_a_writer_that_raises_publishes_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError), store.writer("out.npy") as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    assert store.list("") == []


def test_the_namenode_may_restart(store: Store, hdfs: Hdfs) -> None:
    store.replace("before", b"kept")
    hdfs.kill_namenode()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.create, "during", b"late")
        hdfs.start_namenode()
        assert waiting.result(timeout=120)
    assert (store.read("before"), store.read("during")) == (b"kept", b"late")


def test_the_datanode_may_die_and_come_back(store: Store, hdfs: Hdfs) -> None:
    store.replace("before", b"kept")
    hdfs.kill_datanode()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.read, "before")
        time.sleep(0.2)
        hdfs.start_datanode()
        assert waiting.result(timeout=60) == b"kept"
    store.replace("after", b"new")
    assert store.read("after") == b"new"
