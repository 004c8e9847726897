"""A real S3 server (moto) for the tests, and between it and its clients a proxy that does harm when told to.

The proxy forwards one HTTP request a connection. A `Fault` says what happens to a request that it
matches: an answer of the proxy's own, a reset before or after forwarding (after: the request took
effect and its answer is lost), a delay, or a header taken away.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

SECRET = "topsecretvalue"
BUCKET = "bucket"

_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"


@dataclass
class Fault:
    """What happens to each request that `match` accepts (method, path with query), `times` times at the most.

    `kind`: "slow down" (503), "internal" (500), "expired" (403 ExpiredToken), "unknown header" (501), "reset"
    (before forwarding), "lost" (forwarded, then reset), "cut" (half of the answer), "delay" (`seconds`, then
    forwarded), "unconditional" (forwarded without If-None-Match). `share` is the probability.
    """

    kind: str
    match: Callable[[str, str], bool] = lambda method, path: True
    times: int = 10**9
    share: float = 1.0
    seconds: float = 0.0
    hits: int = 0


@dataclass
class S3:
    """The server through its proxy: what its clients need, and the faults that are on."""

    endpoint: str
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def options(self) -> dict[str, Any]:
        """Storage options."""
        return {"endpoint_url": self.endpoint, "key": "key", "secret": SECRET}

    @property
    def env(self) -> dict[str, str]:
        """The environment of a command line that uses the server."""
        return {**os.environ, "CLIP_BATCH_STORAGE_OPTIONS": json.dumps(self.options), "AWS_DEFAULT_REGION": "us-east-1"}

    @contextlib.contextmanager
    def fault(self, kind: str, match: Callable[[str, str], bool] | None = None, **how: Any) -> Iterator[Fault]:
        """A fault that is on while the block runs."""
        fault = Fault(kind, match, **how) if match else Fault(kind, **how)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def fate(self, method: str, path: str) -> Fault | None:
        """The fault that a request meets, if any."""
        for fault in list(self.faults):
            if fault.hits < fault.times and fault.match(method, path) and self.draw.random() < fault.share:
                fault.hits += 1
                return fault
        return None


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """A running server with a bucket, for the session."""
    port = _free_port()
    # The server ends with its standard input, so that it does not outlive a test run that is killed.
    script = (
        "import sys, threading, os; from moto.server import ThreadedMotoServer as Server; "
        f"Server('127.0.0.1', {port}, verbose=False).start(); sys.stdin.read(); os._exit(0)"
    )
    command = [sys.executable, "-c", script]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        until = time.monotonic() + 60
        while not _listens(port):
            assert server.poll() is None and time.monotonic() < until, "moto does not start"
            time.sleep(0.1)
        with proxied(port) as proxy:
            request(port, "PUT", f"/{BUCKET}", {"Authorization": _anyone()}, b"")
            yield proxy
    finally:
        server.kill()
        server.communicate()


@pytest.fixture
def s3(s3_server: S3) -> Iterator[S3]:
    """The server without faults or log."""
    s3_server.faults.clear()
    s3_server.log.clear()
    yield s3_server
    s3_server.faults.clear()


@contextlib.contextmanager
def proxied(port: int) -> Iterator[S3]:
    """The proxy before a server on loopback, while the block runs."""
    s3 = S3("")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_method(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size)
            self.close_connection = True
            s3.log.append((self.command, self.path))
            fault = s3.fate(self.command, self.path)
            kind = fault.kind if fault else ""
            headers = dict(self.headers.items())
            if kind == "reset":
                return self.reset()
            if own := _OWN.get(kind):
                return self.answer(own[0], _ERROR.format(code=own[1], message=own[2]).encode(), {})
            if kind == "unconditional":
                headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
            if kind == "unknown header" and any(name.lower() == "if-none-match" for name in headers):
                text = _ERROR.format(code="NotImplemented", message="A header you provided is not implemented")
                return self.answer(501, text.encode(), {})
            if fault and kind == "delay":
                time.sleep(fault.seconds)
            status, told, data = request(port, self.command, self.path, headers, body)
            if kind == "lost":
                return self.reset()
            self.answer(status, data, told, len(data) // 2 if kind == "cut" else None)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_method  # noqa: N815

        def answer(self, status: int, data: bytes, headers: dict[str, str], cut: int | None = None) -> None:
            skipped = ("transfer-encoding", "connection", "date", "server")
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in (*skipped, "content-length"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(data)))
                self.send_header("Connection", "close")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[:cut])
                if cut is not None:
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)

        def reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().finish()

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Proxy(http.server.ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Resets are the point."""

    proxy = Proxy(("127.0.0.1", 0), Handler)
    s3.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield s3
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


_OWN = {
    "slow down": (503, "SlowDown", "Please reduce your request rate."),
    "internal": (500, "InternalError", "We encountered an internal error. Please try again."),
    "expired": (403, "ExpiredToken", f"The provided token has expired: {SECRET}"),
}


def request(
    port: int, method: str, path: str, headers: dict[str, str], body: bytes
) -> tuple[int, dict[str, str], bytes]:
    """One request to the server itself: status, headers, body."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        client.request(method, path, body=body or None, headers={**headers, "Connection": "close"})
        answer = client.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        client.close()


def _anyone() -> str:
    return "AWS4-HMAC-SHA256 Credential=key/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
