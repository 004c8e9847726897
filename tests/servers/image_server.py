"""A web server with one image, and with hostile answers that a client must survive."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator
from typing import Any

from tests.corpus import jpeg


class _Images(http.server.BaseHTTPRequestHandler):
    """Answers well or with hostility, by the path of the request."""

    def do_GET(self) -> None:
        moves = {"/moved": "/image", "/loop": "/loop", "/file": "file:///etc/passwd", "/bad": "http://[/"}
        if self.path in moves:
            self.send_response(302)
            self.send_header("location", moves[self.path])
            self.end_headers()
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        else:
            self.send_response(404 if self.path == "/absent" else 200)
            self.end_headers()
            self.wfile.write(b"x" * 5000 if self.path == "/large" else jpeg(1_000_003 + 7))

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def image_server() -> Iterator[str]:
    """Yield the URL of the server, which runs within the block. /image is the JPEG of seed 1, number 7."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Images)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
