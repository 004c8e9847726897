"""Serves a folder as an S3 bucket to read from; the kernel sends the bytes, so a reader is measured, not its server.

    python -m tests.bench.s3_files FOLDER

It answers list, HEAD and ranged GET, and prints its port. The bucket has any name, and its keys are `tars/<file>`;
signatures are not checked.
"""

from __future__ import annotations

import os
import sys
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_LIST = "<ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated>{}</ListBucketResult>"
_ITEM = (
    "<Contents><Key>tars/{}</Key><Size>{}</Size><ETag>{}</ETag>"
    "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if "list-type" in parse_qs(url.query):
            self._list()
            return
        path = self.folder / Path(unquote(url.path)).name
        if not path.is_file():
            self._answer(404, 0)
            return
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            at, stop = 0, size
            if asked := self.headers.get("Range"):
                first, last = asked.removeprefix("bytes=").split("-")
                at, stop = int(first), min(int(last or size) + 1, size)
            self._answer(206 if asked else 200, stop - at, path, f"bytes {at}-{stop - 1}/{size}" if asked else "")
            while self.command == "GET" and at < stop:
                at += os.sendfile(self.connection.fileno(), file.fileno(), at, stop - at)

    def _list(self) -> None:
        items = [_ITEM.format(path.name, path.stat().st_size, etag(path)) for path in sorted(self.folder.iterdir())]
        body = _LIST.format("".join(items)).encode()
        self._answer(200, len(body))
        self.wfile.write(body)

    def _answer(self, status: int, length: int, path: Path | None = None, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if path:
            self.send_header("ETag", f'"{etag(path)}"')
            self.send_header("Last-Modified", formatdate(path.stat().st_mtime, usegmt=True))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing: it would cost more than an answer."""


def etag(path: Path) -> str:
    """A file's version, made of its time of modification."""
    return f"{path.stat().st_mtime_ns:x}"


def main() -> None:
    Handler.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
