"""Downloads: ranges in pieces, resumed, stopped; from a store that fails when told to, and from web servers."""

from __future__ import annotations

import errno
import functools
import http.server
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_batch.errors import Preempted
from clip_batch.storage import download as module
from clip_batch.storage import retry
from clip_batch.storage.download import Download, download, pieces
from clip_batch.storage.transfer import file_version, has_ranges, remote_file
from tests.servers.flaky import Flaky, put

DATA = random.Random(0).randbytes(100_000)


@pytest.fixture(autouse=True)
def _flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(module, "pieces", functools.partial(pieces, size=7_001))
    yield
    Flaky.reset()


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 60))
def test_pieces_tile_their_range(start: int, length: int, size: int) -> None:
    found = pieces(start, start + length, size)
    assert [at for first, last in found for at in range(first, last)] == list(range(start, start + length))
    assert all(last - first == size for first, last in found[:-1])
    assert all(0 < last - first <= size for first, last in found)


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 100_000), (512, 70_000), (99_999, 100_000), (5, 5)])
def test_a_download_is_the_range(tmp_path: Path, start: int, stop: int | None) -> None:
    target = tmp_path / "copy"
    target.touch()
    failed = set()

    def once(what: str, path: str, at: int) -> None:
        if what == "read" and at not in failed and at % 2 == 0:
            failed.add(at)
            raise ConnectionResetError("reset by peer")

    remote = remote_file(put("a", DATA))
    Flaky.before = once
    download(remote, str(target), start, stop)
    assert target.read_bytes() == DATA[start:stop]
    assert max((end - at for what, _, at, end in Flaky.calls if what == "read"), default=0) <= 7_001


def test_stop_ends_pauses_and_pieces(tmp_path: Path) -> None:
    (tmp_path / "copy").touch()
    stop = threading.Event()

    def busy(what: str, path: str, at: int) -> None:
        stop.set()
        raise OSError(errno.EBUSY, "SlowDown")

    remote = remote_file(put("a", DATA))
    Flaky.before = busy
    with ThreadPoolExecutor(1) as pool:
        copy = Download(remote, 0, len(DATA), str(tmp_path / "copy"), pool, stop.is_set)
        with pytest.raises(Preempted):
            copy.finish()
    assert len(Flaky.calls) == 1


def test_a_full_disk_is_named_and_not_retried(tmp_path: Path) -> None:
    remote = remote_file(put("a", DATA))
    with pytest.raises(OSError, match=r"writing /dev/full: No space left.*TMPDIR") as caught:
        download(remote, "/dev/full", 0, 10)
    assert caught.value.errno == errno.ENOSPC
    assert len([call for call in Flaky.calls if call[0] == "read"]) == 1


class Server(http.server.SimpleHTTPRequestHandler):
    """The standard library's server of whole files; with `ranges`, it serves ranges too."""

    ranges = False
    busy = 0

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        if Server.busy:
            Server.busy -= 1
            self.send_error(503)
        elif self.ranges and asked:
            first, last = asked.removeprefix("bytes=").split("-")
            data = DATA[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(DATA)}")
            self.end_headers()
            self.wfile.write(data)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("ranges", [True, False])
def test_web_servers_with_and_without_ranges(tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    monkeypatch.setattr(Server, "ranges", ranges)
    handler = functools.partial(Server, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            remote = remote_file(f"http://127.0.0.1:{server.server_port}/a.tar")
            assert has_ranges(remote) is ranges
            size, etag = file_version(remote)
            assert (size, bool(etag)) == (len(DATA), True)
            target = tmp_path / "copy"
            target.touch()
            Server.busy = 2
            download(remote, str(target), 1_000, 50_000)
            assert target.read_bytes() == DATA[1_000:50_000]
            with pytest.raises(FileNotFoundError):
                file_version(remote_file(f"http://127.0.0.1:{server.server_port}/b.tar"))
        finally:
            server.shutdown()
