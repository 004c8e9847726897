"""Clients that are slow, and bodies that cost much: the service answers others meanwhile, and does not grow."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import select
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.servers.processes import mine
from tests.servers.serving import make_index, running

pytestmark = pytest.mark.slow

HEADER_SECONDS, CONNECTIONS, SLOW = 2, 100, 70
BODY = 20_000_000


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Callable[[], int]]]:
    """Yield the host, the URL and the peak of memory of a service."""
    folder = tmp_path_factory.mktemp("hostile")
    index = make_index(folder)
    bounds = ("--header-timeout", str(HEADER_SECONDS), "--max-connections", str(CONNECTIONS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOSTILE", str(folder))
        with running({"index": index}, *bounds) as url:
            (pid,) = mine(f"HOSTILE={folder}")

            def peak() -> int:
                match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
                assert match
                return int(match[1]) * 1024

            yield urlsplit(url).netloc, url, peak


def ask(host: str, path: str, body: bytes | None = None) -> tuple[int, bytes, float]:
    """Return status, content and seconds of a request."""
    connection = http.client.HTTPConnection(host, timeout=60)
    started = time.monotonic()
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all is sent
            connection.request("POST" if body else "GET", path, body)
        response = connection.getresponse()
        return response.status, response.read(), time.monotonic() - started
    finally:
        connection.close()


@pytest.fixture
def sockets() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def opened(host: str, said: bytes, sockets: contextlib.ExitStack) -> socket.socket:
    name, _, port = host.partition(":")
    connection = sockets.enter_context(socket.create_connection((name, int(port)), 10))
    connection.sendall(said)
    return connection


def closed(connection: socket.socket) -> bool:
    if not select.select([connection], [], [], 0)[0]:
        return False
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


HEAD = b"GET /v1/indices HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("said", [b"", b"G", HEAD, HEAD + b"X-Slow: "], ids=["idle", "byte", "header", "value"])
def test_slow_connections_are_closed(service: tuple[str, str, Any], sockets: contextlib.ExitStack, said: bytes) -> None:
    host, _, _ = service
    slow = [opened(host, said, sockets) for _ in range(SLOW)]
    started = time.monotonic()
    while not all(map(closed, slow)):
        assert time.monotonic() - started < 4 * HEADER_SECONDS
        if said:
            for connection in slow:  # a byte now and then does not help
                with contextlib.suppress(OSError):
                    connection.send(b"x")
        status, _, seconds = ask(host, "/healthz")
        assert (status, seconds < 1) == (200, True)
        time.sleep(0.2)


def test_a_second_request_is_as_slow(service: tuple[str, str, Any], sockets: contextlib.ExitStack) -> None:
    connection = opened(service[0], HEAD + b"\r\n" + HEAD, sockets)
    connection.settimeout(4 * HEADER_SECONDS)
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            said += piece
    assert said.count(b"HTTP/1.1 200 OK") == 1


def test_more_connections_than_there_may_be(service: tuple[str, str, Any], sockets: contextlib.ExitStack) -> None:
    host, _, _ = service
    slow = [opened(host, HEAD, sockets) for _ in range(CONNECTIONS + 30)]
    time.sleep(0.2)
    assert ask(host, "/v1/search", b'{"id": 1}')[0] == 200, "the oldest of those that wait gave way"
    assert sum(map(closed, slow)) >= 30


def bodies() -> Iterator[tuple[str, bytes]]:
    """Yield requests of up to 20 MB without an image, and the path of each."""
    keys = "{" + ",".join(f'"{number:x}":1' for number in range(BODY // 12)) + "}"
    fewer = "{" + ",".join(f'"{number:060x}":1' for number in range(BODY // 66)) + "}"
    empty = ",".join(["{}"] * (BODY // 3 - 100))
    yield "/v1/search", keys.encode()
    yield "/v1/search", fewer.encode()
    yield "/v1/search", f'{{"queries":[{empty}]}}'.encode()
    yield "/v1/search", f'{{"filters":[{empty}]}}'.encode()
    yield "/v1/search", ('{"filters":' * 1_000_000).encode()
    yield "/v1/search", b"[" * BODY
    yield "/v1/embed", f'{{"texts":[{",".join(["0"] * 380_000)}]}}'.encode()
    yield "/knn-service", keys.encode()
    yield "/metadata", f'{{"ids":[{",".join(["1"] * (BODY // 2 - 20))}]}}'.encode()
    yield "/v1/search", b'{"text":"' + b"a" * (BODY - 20) + b'"}'


def test_large_bodies_hold_nobody(service: tuple[str, str, Callable[[], int]]) -> None:
    host, _, peak = service
    before, waits, done = peak(), list[float](), threading.Event()

    def look() -> None:
        while not done.is_set():
            status, _, seconds = ask(host, "/healthz")
            assert status == 200
            waits.append(seconds)

    looking = threading.Thread(target=look)
    looking.start()
    for path, body in bodies():
        status, answer, seconds = ask(host, path, body)
        assert status in (413, 422), answer[:300]
        assert len(answer) < 1000 and seconds < 20
    done.set()
    looking.join()
    # Python's lock is held while a body is parsed; what took seconds was what followed.
    began = time.monotonic()
    json.loads(list(bodies())[1][1])
    parsing = time.monotonic() - began
    assert max(waits) < 1 + 5 * parsing, (max(waits), parsing)
    assert peak() - before < 400 * 2**20


def tiff(side: int, samples: int, bits: int) -> bytes:
    """Return a black TIFF of one strip, compressed to a few hundred kilobytes."""
    strip = zlib.compress(bytes(side * side * samples * bits // 8), 9)
    more = struct.pack(f"<{samples}H", *[bits] * samples)
    at = 8 + len(strip)
    entries = [(256, side), (257, side), (258, at), (259, 8), (262, 2), (273, 8), (277, samples), (278, side)]
    entries += [(279, len(strip)), (338, 0)]
    table = b"".join(
        struct.pack("<HHII", tag, 3 if tag in (258, 338) else 4, samples if tag == 258 else 1, value)
        for tag, value in entries
    )
    return (
        b"II*\0" + struct.pack("<I", at + len(more)) + strip + more + struct.pack("<H", len(entries)) + table + bytes(4)
    )


def test_pictures_that_need_much_memory(service: tuple[str, str, Callable[[], int]]) -> None:
    host, _, peak = service
    large, fits = (base64.b64encode(tiff(side, 4, 16)).decode() for side in (7000, 4000))
    assert len(large) < 600_000
    ask(host, "/v1/search", json.dumps({"image": fits}).encode())
    before = peak()
    answers: list[tuple[int, bytes, float]] = []

    def search(image: str) -> None:
        answers.append(ask(host, "/v1/search", json.dumps({"image": image}).encode()))

    asking = [threading.Thread(target=search, args=(image,)) for image in [large, fits] * 8]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert sorted(status for status, _, _ in answers) == [200] * 8 + [400] * 8, answers[0]
    assert any(b"bytes, more than" in answer for _, answer, _ in answers)
    assert peak() - before < 600 * 2**20
