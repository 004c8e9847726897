"""Checks that the tests of S3 and of GCS share."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clip_batch.storage.store import Store
from clip_batch.storage.transfer import copy_range, remote_file
from tests.servers.proxy import Proxied


def one_of_many_racing_creators_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: store.create("commit.json", b"%d" % number, check_first=False), range(16)))
    assert sum(won) == 1
    assert store.read("commit.json") == b"%d" % won.index(True)


def large_reads_go_past_the_client(
    store: Store, server: Proxied, kind: str, ranged: Callable[[str, str], bool], tmp_path: Path
) -> None:
    data = random.Random(0).randbytes(3_000_000)
    store.replace("a b+c?.tar", data)
    target = tmp_path / "a"
    target.write_bytes(b"x" * 100)
    remote = remote_file(f"{store.url}/a b+c?.tar", store.options)
    with server.fault(kind, ranged, times=2) as fault:
        copy_range(remote, 10, len(data) - 10, str(target), 100)
    assert fault.hits == (1 if kind == "delay" else 2)
    assert target.read_bytes() == b"x" * 100 + data[10:-10]
    store.remove("a b+c?.tar")
    with pytest.raises(FileNotFoundError):
        copy_range(remote, 0, 10, str(target), 0)


def an_upload_goes_through_faults(store: Store, server: Proxied, uploads: Callable[[str, str], bool]) -> None:
    with server.fault("reset", uploads, times=3) as fault, store.writer("large.npy") as file:
        file.truncate(120 * 2**20)
        file.seek(110 * 2**20)
        file.write(b"end")
    assert fault.hits == 3
    assert store.size("large.npy") == 120 * 2**20
    with store.open("large.npy") as stored:
        stored.seek(110 * 2**20)
        assert stored.read(4) == b"end\0"
    store.remove("large.npy")
