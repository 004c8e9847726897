"""The process that fetches large slices: same bytes and errors as without it, and it ends with its parent."""

from __future__ import annotations

import http.server
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clip_batch.errors import InputError, Preempted
from clip_batch.samples import prefetch, read_slice
from clip_batch.samples.fetch_process import Fetcher, opens_elsewhere
from clip_batch.samples.prefetch import Prefetcher
from clip_batch.storage.download import pieces
from clip_batch.storage.store import Store
from clip_batch.storage.transfer import RemoteFile, copy_range, remote_file
from clip_batch.types import Sample, Shard, Slice
from tests import corpus
from tests.servers.gcs_server import gcs as gcs
from tests.servers.gcs_server import gcs_server as gcs_server
from tests.servers.proxy import Proxied
from tests.servers.s3_server import SECRET
from tests.servers.s3_server import s3 as s3
from tests.servers.s3_server import s3_server as s3_server

DATA = random.Random(0).randbytes(300_000)


class Web(http.server.BaseHTTPRequestHandler):
    """Gives ranges of `data`, of /hang only once `go` is set, and nothing else."""

    go = threading.Event()
    asked = threading.Event()
    busy = 0

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()

    def do_GET(self) -> None:
        self.asked.set()
        if "none" in self.path or Web.busy:
            Web.busy = max(0, Web.busy - 1)
            self.send_error(404 if "none" in self.path else 503)
            return
        if "hang" in self.path:
            self.go.wait(20)
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        data = DATA[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(DATA)}")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    Web.go.clear()
    Web.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        Web.go.set()
        server.shutdown()


@pytest.fixture
def fetcher() -> Iterator[Fetcher]:
    fetcher = Fetcher()
    yield fetcher
    fetcher.close()


def pid(fetcher: Fetcher) -> int:
    assert fetcher._process
    return fetcher._process.pid


def runs(number: int) -> bool:
    """Whether a process is there, and is no zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def fetch(fetcher: Fetcher, remote: RemoteFile, target: Path, start: int, stop: int, piece: int = 10_007) -> bytes:
    target.write_bytes(b"")
    with ThreadPoolExecutor(4) as pool:
        wanted = [(first, last, str(target), first - start) for first, last in pieces(start, stop, piece)]
        list(pool.map(lambda one: fetcher.copy(remote, *one), wanted))
    return target.read_bytes()


def test_it_copies_what_is_asked_for(web: str, fetcher: Fetcher, tmp_path: Path) -> None:
    remote = remote_file(f"{web}/a.tar")
    Web.busy = 1
    assert fetch(fetcher, remote, tmp_path / "a", 0, len(DATA)) == DATA
    first = pid(fetcher)
    assert first != os.getpid()
    assert fetch(fetcher, remote, tmp_path / "b", 1_000, 120_000) == DATA[1_000:120_000]
    assert pid(fetcher) == first, "one process for all"


def test_its_errors_are_those_of_this_process(web: str, fetcher: Fetcher, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    missing, there = remote_file(f"{web}/none.tar"), remote_file(f"{web}/a.tar")
    wrong = RemoteFile(None, "", "https://%zz", {"no_such_option": 1})
    for remote, target in ((missing, tmp_path / "a"), (there, Path("/dev/full")), (there, tmp_path / "gone")):
        told = []
        for copy in (fetcher.copy, copy_range):
            with pytest.raises(OSError, match=r"(reading|writing) \S+: [^\n]+$") as caught:
                copy(remote, 0, 10, str(target), 0)
            told.append((type(caught.value), caught.value.errno, str(caught.value)))
        assert told[0] == told[1]
    with pytest.raises(InputError, match=r"reading https://%zz: .*no_such_option.*check"):
        fetcher.copy(wrong, 0, 10, str(tmp_path / "a"), 0)
    assert runs(pid(fetcher))


def test_the_work_goes_on_without_it(web: str, fetcher: Fetcher, tmp_path: Path) -> None:
    remote, waiting = remote_file(f"{web}/hang.tar"), ThreadPoolExecutor(1)
    found = waiting.submit(fetch, fetcher, remote, tmp_path / "a", 0, 1_000)
    assert Web.asked.wait(20)
    os.kill(pid(fetcher), signal.SIGKILL)
    Web.go.set()
    assert found.result(20) == DATA[:1_000]
    assert fetch(fetcher, remote, tmp_path / "b", 0, len(DATA)) == DATA
    waiting.shutdown()


def test_an_end_is_at_once(web: str, fetcher: Fetcher, tmp_path: Path) -> None:
    stopped = threading.Event()

    def pause(seconds: float) -> None:
        if stopped.is_set():
            raise Preempted()

    (tmp_path / "a").touch()
    with ThreadPoolExecutor(1) as waiting:
        found = waiting.submit(fetcher.copy, remote_file(f"{web}/hang.tar"), 0, 10, str(tmp_path / "a"), 0, pause)
        assert Web.asked.wait(20)
        child = pid(fetcher)
        started = time.monotonic()
        stopped.set()
        fetcher.close()
        with pytest.raises(Preempted):
            found.result(5)
    assert time.monotonic() - started < 3
    assert not runs(child)


def test_it_ends_with_the_process_that_began_it(web: str, tmp_path: Path) -> None:
    script = """
import sys, threading, time
from clip_batch.samples.fetch_process import Fetcher
from clip_batch.storage.transfer import remote_file
fetcher = Fetcher()
copy = threading.Thread(target=fetcher.copy, args=(remote_file(sys.argv[1]), 0, 10, sys.argv[2], 0), daemon=True)
copy.start()
while not fetcher._process:
    time.sleep(0.01)
print(fetcher._process.pid, flush=True)
copy.join()
"""
    (tmp_path / "a").touch()
    command = [sys.executable, "-c", script, f"{web}/hang.tar", str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as began:
        assert began.stdout
        child = int(began.stdout.readline())
        assert Web.asked.wait(20) and runs(child)
        os.kill(child, signal.SIGTERM)  # as a scheduler sends it to all: the other process decides
        time.sleep(0.2)
        assert runs(child)
        began.kill()
    until = time.monotonic() + 10
    while runs(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not runs(child)


def test_what_a_program_registered_is_read_in_it() -> None:
    urls = ("s3://a/b", "hdfs:///a", "https://a/b", "gs://a/b", "memory://a", "flaky://a", "/a", "file:///a")
    assert [opens_elsewhere(url) for url in urls] == [True] * 4 + [False] * 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_large_slices_of_a_store_come_through_it(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: Proxied = request.getfixturevalue(kind)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(prefetch, "LARGE", 1)
    tars = [corpus.good_tar(str(tmp_path / f"{number}.tar"), 30, seed=number) for number in range(4)]
    store = Store(f"{server.bucket}/fetched", server.options)
    for tar in tars:
        store.replace(Path(tar).name, Path(tar).read_bytes())
    slices = [Slice(Shard(f"{store.url}/{Path(tar).name}", os.path.getsize(tar))) for tar in tars]
    slices.insert(2, Slice(Shard(f"{store.url}/none.tar", 10_000)))
    plan = corpus.plan_of()

    def contents(piece: Slice, files: Prefetcher | None) -> list[object]:
        found = [item for item in read_slice(piece, plan, server.options, files) if isinstance(item, Sample)]
        return [(item.key, bytes(item.image or b""), item.caption) for item in found]

    with Prefetcher(slices, server.options, 10**9) as files, server.fault("slow down", times=2):
        for piece in slices:
            if "none" in piece.shard.url:
                with pytest.raises(InputError, match=rf"cannot read {store.url}/none\.tar"):
                    contents(piece, files)
            else:
                assert contents(piece, files) == contents(
                    Slice(Shard(str(tmp_path / Path(piece.shard.url).name))), None
                )
        child = pid(files._fetcher)
        for what in ("cmdline", "environ"):
            assert SECRET.encode() not in Path(f"/proc/{child}/{what}").read_bytes()
    assert not runs(child)
