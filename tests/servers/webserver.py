"""A web server of images for tests, with paths for everything that goes wrong on the web."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
import time
from collections import Counter
from collections.abc import Iterator

from tests.corpus import bomb, jpeg

SLOW = 4.0
"""Seconds before /slow answers."""


class Web(http.server.ThreadingHTTPServer):
    """Serves /good/N.jpg, N a seed, and the paths of `BAD`; counts the requests by path, and may be slow."""

    daemon_threads = True
    request_queue_size = 256
    pause = 0.0
    """Seconds before each answer."""
    side = 64
    """Pixels of an image's sides."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Print nothing: a client that disconnects is no error here."""


BAD = {
    "/missing.jpg": "404",
    "/slow.jpg": "timed out",
    "/page.jpg": "decoding",
    "/cut.jpg": "decoding",
    "/huge.png": "",
    "/noai.jpg": "X-Robots-Tag",
    "/circle.jpg": "",
    "/closed.jpg": "",
}
"""Path -> what img2dataset's message of it has; any, where libraries word it as they like."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        time.sleep(self.server.pause)
        name = self.path.partition("?")[0]
        if name.startswith("/good/"):
            self.give(image(int(name[6:].partition(".")[0]), self.server.side))
        elif name == "/moved.jpg":
            self.give(b"", 302, location="/good/7.jpg")
        elif name == "/circle.jpg":
            self.give(b"", 302, location="/circle.jpg")
        elif name == "/slow.jpg":
            time.sleep(SLOW)
            self.give(image(1))
        elif name == "/page.jpg":
            self.give(b"<html><body>Log in</body></html>", kind="text/html")
        elif name == "/cut.jpg":
            self.give(image(1)[:300])
        elif name == "/huge.png":
            self.give(bomb(20_000))
        elif name == "/noai.jpg":
            self.give(image(1), **{"x-robots-tag": "noai"})
        elif name == "/closed.jpg":
            self.close_connection = True
        else:
            self.give(b"", 404)

    def give(self, data: bytes, status: int = 200, kind: str = "image/jpeg", **headers: str) -> None:
        self.send_response(status)
        for header, value in {"content-type": kind, "content-length": str(len(data)), **headers}.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@functools.lru_cache(4096)
def image(seed: int, side: int = 64) -> bytes:
    return jpeg(seed, side)


@contextlib.contextmanager
def web() -> Iterator[Web]:
    """Run the server within the block."""
    server = Web()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
