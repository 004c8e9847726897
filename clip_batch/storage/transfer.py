"""Remote files and reads of byte ranges from them, each retried when a store falters.

Nothing here knows what the bytes are. Downloads of several pieces at once are in `clip_batch.storage.download`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

from clip_batch.errors import InputError
from clip_batch.storage.direct import s3_chunks
from clip_batch.storage.filesystem import filesystem
from clip_batch.storage.retry import Sleep, call_store

T = TypeVar("T")


class RemoteFile(NamedTuple):
    """A file of a remote store: fsspec's filesystem, the path within it, the URL, and the store's options."""

    fs: Any
    path: str
    url: str
    options: dict[str, Any]

    def call(self, what: str, operation: Callable[[], T], sleep: Sleep = time.sleep) -> T:
        """Run an operation on the file; `what` ("reading") and the URL begin its errors (see `call_store`)."""
        return call_store(operation, f"{what} {self.url}", self.options, sleep)

    @property
    def is_http(self) -> bool:
        """Whether a web server serves the file."""
        return self.url.startswith(("http://", "https://"))


def remote_file(url: str, options: dict[str, Any] | None = None) -> RemoteFile:
    """The file of a URL; InputError if no package opens it. Sends no request."""
    return RemoteFile(*filesystem(url, options), url, options or {})


class FileVersion(NamedTuple):
    """A file's size in bytes, and its etag, generation or modification time; None where the store does not tell."""

    size: int | None
    etag: str | None


def file_version(remote: RemoteFile, sleep: Sleep = time.sleep) -> FileVersion:
    """Size and etag of a file now; FileNotFoundError if absent, OSError if the store does not answer."""
    info = remote.call("asking for", lambda: remote.fs.info(remote.path), sleep)
    return FileVersion(info.get("size"), etag_of(info))


def etag_of(info: dict[str, Any]) -> str | None:
    """What an fsspec `info` says about the version of a file; None if nothing."""
    return next((str(info[name]).strip('"') for name in _ETAGS if info.get(name)), None)


def local_etag(status: os.stat_result) -> str:
    """The etag of a local file: when it was last written, in nanoseconds, as hexadecimal digits."""
    return f"{status.st_mtime_ns:x}"


_ETAGS = (
    *("generation", "ETag", "etag", "mtime"),  # GCS's etag also changes with metadata, its generation does not
    *("LastModified", "last_modified", "Last-Modified", "modification_time", "created"),
)


def has_ranges(remote: RemoteFile) -> bool:
    """False for a web server that only serves whole files; each server is asked once."""
    if not remote.is_http:
        return True
    origin = "/".join(remote.url.split("/")[:3])
    if origin not in _origins:
        try:
            _origins[origin] = bool(_read(remote, 1, 2))
        except ValueError:  # fsspec's error where the response is not the range
            _origins[origin] = False
        except Exception:  # reading the file will raise it again, with retries
            return True
    return _origins[origin]


_origins: dict[str, bool] = {}


def read_range(remote: RemoteFile, start: int, stop: int, sleep: Sleep = time.sleep) -> bytes:
    """Read exactly the bytes [start, stop). InputError if the file ends earlier; else errors as `file_version`."""
    data = b""
    while start + len(data) < stop:  # rarely more than once: responses may be short
        data += remote.call("reading", partial(_read, remote, start + len(data), stop), sleep)
    return data


def _read(remote: RemoteFile, start: int, stop: int) -> bytes:
    """Read at least one byte of [start, stop), and none beyond."""
    if remote.is_http:
        # `open` rejects a response that is not the range before taking it in; the given size spares a request.
        with remote.fs.open(remote.path, "rb", size=stop, cache_type="none") as file:
            file.seek(start)
            data = bytes(file.read(stop - start))
    else:
        data = bytes(remote.fs.cat_file(remote.path, start=start, end=stop))
    if not data:
        size = remote.fs.info(remote.path).get("size")
        if size is not None and size < stop:
            raise InputError(f"{remote.url} ends at byte {size}, not {stop} as before: copy it again, or plan again")
        raise OSError("an empty answer")
    return data[: stop - start]


def copy_range(remote: RemoteFile, start: int, stop: int, target: str, at: int, sleep: Sleep = time.sleep) -> None:
    """Copy the bytes [start, stop) to byte `at` of an existing local file. Errors as `read_range`, or the disk's."""
    shift = at - start
    chunks: Iterator[bytes | memoryview] = iter(())

    def next_chunk() -> bytes | memoryview:
        nonlocal chunks
        chunk = next(chunks, None)
        if chunk is None:  # the first call, or a response that ended early
            chunks = _chunks(remote, start, stop)
            chunk = next(chunks)
        return chunk

    with TargetFile(target) as file:
        while start < stop:
            chunk = remote.call("reading", next_chunk, sleep)
            file.write(start + shift, chunk)
            start += len(chunk)


CopyRange = Callable[[RemoteFile, int, int, str, int, Sleep], None]
"""`copy_range`, or a function that does the same in another process."""


def _chunks(remote: RemoteFile, start: int, stop: int) -> Iterator[bytes | memoryview]:
    """As `_read`, but in chunks as they arrive, where that spares copies; each is valid until the next one."""
    streamed: Iterator[bytes | memoryview] = iter(())
    if remote.url.startswith(("s3://", "s3a://")):
        streamed = s3_chunks(remote.fs, remote.path, start, stop)
    elif hasattr(remote.fs, "chunks"):
        streamed = remote.fs.chunks(remote.path, start, stop)
    first = next(streamed, None)
    yield _read(remote, start, stop) if first is None else first
    yield from streamed


class TargetFile:
    """An existing local file, written at any place by any thread; a context manager. Its errors name the file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> TargetFile:
        with self._named_errors():
            self.descriptor = os.open(self.path, os.O_WRONLY)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def write(self, at: int, data: bytes | memoryview) -> None:
        """Write all of `data` at byte `at`."""
        left = memoryview(data)
        with self._named_errors():
            while left:
                written = os.pwrite(self.descriptor, left, at)
                left, at = left[written:], at + written

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"writing {self.path}: {error.strerror}; make room, or set TMPDIR to a larger disk"
            raise OSError(error.errno, message) from None
