"""A proxy between a store's server and its clients that injects faults.

It forwards one HTTP request a connection. A `Fault` says what happens to a request that it matches: an answer of the
proxy's own, a reset before or after forwarding (after: the request took effect and its answer is lost), a delay, or
the removal of a header.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar


@dataclass
class Fault:
    """What happens to each request that `match` accepts (method, path with query), at most `times` times.

    `kind`: one of the server's `answers` ("slow down", "internal", "expired", ...), or "unknown header" (one of
    them where the request is conditional), "reset" (before forwarding), "lost" (forwarded, then reset), "cut" (half
    of the answer), "delay" (`seconds`, then forwarded), "unconditional" (forwarded without If-None-Match).
    `share` is the probability.
    """

    kind: str
    match: Callable[[str, str], bool] = lambda method, path: True
    times: int = 10**9
    share: float = 1.0
    seconds: float = 0.0
    hits: int = 0


@dataclass
class Proxied:
    """A server behind its proxy: its address, the active faults, and the requests so far."""

    answers: ClassVar[dict[str, tuple[int, str]]] = {}
    """Status and body of the proxy's own answers, by kind of fault."""

    pages: ClassVar[dict[str, str]] = {}
    """Answers of the proxy itself, by path."""

    bucket: ClassVar[str] = ""
    """URL of the bucket that exists from the start."""

    endpoint: str = ""
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    @contextlib.contextmanager
    def fault(self, kind: str, match: Callable[[str, str], bool] | None = None, **how: Any) -> Iterator[Fault]:
        """Inject a fault while the block runs."""
        fault = Fault(kind, match, **how) if match else Fault(kind, **how)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def fate(self, method: str, path: str) -> Fault | None:
        """The first active fault that matches a request; None if there is none."""
        for fault in list(self.faults):
            if fault.hits < fault.times and fault.match(method, path) and self.draw.random() < fault.share:
                fault.hits += 1
                return fault
        return None

    @property
    def options(self) -> dict[str, Any]:
        """Storage options."""
        raise NotImplementedError

    @contextlib.contextmanager
    def clean(self) -> Iterator[Any]:
        """The server for one test, without faults or requests of earlier ones."""
        self.faults.clear()
        self.log.clear()
        try:
            yield self
        finally:
            self.faults.clear()


P = TypeVar("P", bound=Proxied)


@contextlib.contextmanager
def proxied(server: P, port: int) -> Iterator[P]:
    """Run the proxy of a server on loopback within the block; the server may start later."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_method(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size)
            self.close_connection = True
            server.log.append((self.command, self.path))
            fault = server.fate(self.command, self.path)
            kind = fault.kind if fault else ""
            headers = dict(self.headers.items())
            conditional = any(name.lower() == "if-none-match" for name in headers)
            if kind == "reset":
                return self.reset()
            if kind in server.answers and (conditional or kind != "unknown header"):
                status, text = server.answers[kind]
                return self.answer(status, text.encode(), {})
            if self.path in server.pages:
                return self.answer(200, server.pages[self.path].encode(), {"Content-Type": "application/json"})
            if kind == "unconditional":
                headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
            if fault and kind == "delay":
                time.sleep(fault.seconds)
            status, told, data = request(port, self.command, self.path, headers, body)
            if kind == "lost":
                return self.reset()
            self.answer(status, data, told, len(data) // 2 if kind == "cut" else None)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = handle_method  # noqa: N815

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
            """Print nothing: resets are intended."""

    proxy = Proxy(("127.0.0.1", 0), Handler)
    server.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


def request(
    port: int, method: str, path: str, headers: dict[str, str], body: bytes
) -> tuple[int, dict[str, str], bytes]:
    """Send one request to the server itself; returns status, headers and body."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        client.request(method, path, body=body or None, headers={**headers, "Connection": "close"})
        answer = client.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        client.close()


def wait_for(port: int, alive: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until a server listens on a port; AssertionError if it died, or if that takes too long."""
    until = time.monotonic() + seconds
    while not _listens(port):
        assert alive() and time.monotonic() < until, "the server does not start"
        time.sleep(0.1)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
