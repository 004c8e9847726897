"""Remote bytes to this machine: ranged reads, several at once, each tried again when a store falters.

Memory is bounded by the threads that read: one piece each. Nothing here knows what the bytes are.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, NamedTuple, TypeVar

from clip_batch.errors import InputError, Preempted
from clip_batch.storage.direct import s3_chunks
from clip_batch.storage.filesystem import filesystem
from clip_batch.storage.retry import ask

PIECE = 16 * 2**20
"""Bytes of one ranged read: long enough that a round trip of 30 ms costs little."""

THREADS = 4
"""Reads at once, each with a piece in memory; an object store gives one connection 50 to 100 MB/s."""

# GCS's generation first: it changes with the bytes alone, and the etag there with each edit of the metadata too.
_ETAGS = (
    *("generation", "ETag", "etag", "mtime"),
    *("LastModified", "last_modified", "Last-Modified", "modification_time", "created"),
)
_STREAM = 2**20
_POLL = 0.25  # seconds until a request to stop is noticed

T = TypeVar("T")
Wait = Callable[[float], object]


class RemoteFile(NamedTuple):
    """A file of a remote store: fsspec's filesystem, the path within it, the URL, and the store's options."""

    fs: Any
    path: str
    url: str
    options: dict[str, Any]

    def ask(self, what: str, call: Callable[[], T], wait: Wait = time.sleep) -> T:
        """See `clip_batch.storage.retry.ask`."""
        return ask(call, f"{what} {self.url}", self.options, wait)


def source(url: str, options: dict[str, Any] | None = None) -> RemoteFile:
    """The file of a URL; InputError if no package opens it. Nothing is asked of the store yet."""
    return RemoteFile(*filesystem(url, options), url, options or {})


class FileVersion(NamedTuple):
    """What a store says of a file: its size in bytes, and its etag, generation or modification time; None: not said."""

    size: int | None
    etag: str | None


def etag_of(info: dict[str, Any]) -> str | None:
    """What an fsspec `info` says of the version, None if nothing."""
    return next((str(info[name]).strip('"') for name in _ETAGS if info.get(name)), None)


def version(source: RemoteFile, wait: Wait = time.sleep) -> FileVersion:
    """Size and etag of a file now; FileNotFoundError if absent, OSError if the store does not answer."""
    info = source.ask("asking for", lambda: source.fs.info(source.path), wait)
    return FileVersion(info.get("size"), etag_of(info))


def pieces(start: int, stop: int, size: int = PIECE) -> list[tuple[int, int]]:
    """[start, stop) in runs of `size`, in order, the last one shorter."""
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def read_range(source: RemoteFile, start: int, stop: int, wait: Wait = time.sleep) -> bytes:
    """The bytes [start, stop) of a file, all of them. InputError if it ends earlier; else as `version`."""
    found = b""
    while start + len(found) < stop:  # short answers are rare
        found += source.ask("reading", partial(_read, source, start + len(found), stop), wait)
    return found


def _read(source: RemoteFile, start: int, stop: int) -> bytes:
    """At least one byte of [start, stop), and none beyond."""
    if _is_http(source):
        # Refuses an answer that is not of the range, without taking it in; the size spares it a question.
        with source.fs.open(source.path, "rb", size=stop, cache_type="none") as file:
            file.seek(start)
            piece = bytes(file.read(stop - start))
    else:
        piece = bytes(source.fs.cat_file(source.path, start=start, end=stop))
    if not piece:
        size = source.fs.info(source.path).get("size")
        if size is not None and size < stop:
            raise InputError(f"{source.url} ends at byte {size}, not {stop} as before: copy it again, or plan again")
        raise OSError("an empty answer")
    return piece[: stop - start]


def copy_range(source: RemoteFile, start: int, stop: int, target: str, at: int, wait: Wait = time.sleep) -> None:
    """Put the bytes [start, stop) at byte `at` of an existing local file. Errors as `read_range`, or the disk's."""
    shift = at - start
    chunks: Iterator[bytes | memoryview] = iter(())

    def following() -> bytes | memoryview:
        nonlocal chunks
        chunk = next(chunks, None)
        if chunk is None:  # an answer was short, or broke off, or is the first
            chunks = _chunks(source, start, stop)
            chunk = next(chunks)
        return chunk

    with _Target(target) as file:
        while start < stop:
            chunk = source.ask("reading", following, wait)
            file.write(start + shift, chunk)
            start += len(chunk)


Copy = Callable[[RemoteFile, int, int, str, int, Wait], None]
"""`copy_range`, or what stands in for it."""


def _chunks(source: RemoteFile, start: int, stop: int) -> Iterator[bytes | memoryview]:
    """As `_read`, but as it comes in where that spares copies; a chunk holds until the next one."""
    fs, path = source.fs, source.path
    coming: Iterator[bytes | memoryview] = iter(())
    if source.url.startswith(("s3://", "s3a://")):
        coming = s3_chunks(fs, path, start, stop)
    elif hasattr(fs, "chunks"):
        coming = fs.chunks(path, start, stop)
    first = next(coming, None)
    yield _read(source, start, stop) if first is None else first
    yield from coming


class _Target:
    """An existing local file that is written here and there; an error names it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> _Target:
        with self._told():
            self.descriptor = os.open(self.path, os.O_WRONLY)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def write(self, at: int, data: bytes | memoryview) -> None:
        left = memoryview(data)
        with self._told():
            while left:
                written = os.pwrite(self.descriptor, left, at)
                left, at = left[written:], at + written

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"writing {self.path}: {error.strerror}; make room, or set TMPDIR to a larger disk"
            raise OSError(error.errno, message) from None


def _is_http(source: RemoteFile) -> bool:
    return source.url.startswith(("http://", "https://"))


def has_ranges(source: RemoteFile) -> bool:
    """False for a web server that only gives whole files; asked once a server."""
    if not _is_http(source):
        return True
    origin = "/".join(source.url.split("/")[:3])
    if origin not in _origins:
        try:
            _origins[origin] = bool(_read(source, 1, 2))
        except ValueError:  # what fsspec raises for an answer that is not of the range
            _origins[origin] = False
        except Exception:  # whoever reads the file will be told, and may try again
            return True
    return _origins[origin]


_origins: dict[str, bool] = {}


class Download:
    """The bytes [start, stop) of a remote file on their way into the local file `target`.

    They arrive in any order, on the threads of `pool`. `stop` None means to the end. Once `stopped`
    says so, no piece begins and no pause goes on. `then` is called behind the last piece, on its thread.
    `arrived` is told of each piece; `wanted` leaves out pieces that are there; `copy` fetches one.
    """

    def __init__(
        self,
        source: RemoteFile,
        start: int,
        stop: int | None,
        target: str,
        pool: ThreadPoolExecutor,
        stopped: Callable[[], bool] = lambda: False,
        then: Callable[[], object] = lambda: None,
        arrived: Callable[[int, int], object] = lambda start, stop: None,
        wanted: Sequence[tuple[int, int]] | None = None,
        copy: Copy = copy_range,
    ) -> None:
        self.source, self.start, self.target, self.stopped = source, start, target, stopped
        self.then, self.arrived, self.copy = then, arrived, copy
        self._lock = threading.Lock()
        if stop is None or not has_ranges(source):
            self._left = 1
            self._tasks = [pool.submit(self._run, self._stream, start, stop)]
        else:
            wanted = pieces(start, stop) if wanted is None else wanted
            wanted = wanted or [(start, start)]
            self._left = len(wanted)
            self._tasks = [pool.submit(self._run, self._piece, *piece) for piece in wanted]

    def finish(self) -> None:
        """Wait for the last byte, and `then`. Raises the first error, or Preempted."""
        unfinished: set[Future[None]] = set(self._tasks)
        while unfinished:
            done, unfinished = wait(unfinished, _POLL, FIRST_EXCEPTION)
            if self.stopped():
                raise Preempted()
            for task in done:
                task.result()

    def cancel(self) -> None:
        """Begin no more pieces of it."""
        for task in self._tasks:
            task.cancel()

    def pause(self, seconds: float) -> None:
        """Sleep, or raise Preempted soon after that is asked."""
        until = time.monotonic() + seconds
        while not self.stopped():
            if (left := until - time.monotonic()) <= 0:
                return
            time.sleep(min(left, _POLL))
        raise Preempted()

    def _run(self, work: Callable[[int, Any], None], start: int, stop: int | None) -> None:
        self.pause(0)
        work(start, stop)
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self.then()

    def _piece(self, start: int, stop: int) -> None:
        self.copy(self.source, start, stop, self.target, start - self.start, self.pause)
        self.arrived(start, stop)

    def _stream(self, start: int, stop: int | None) -> None:
        """One request from the first byte on, passing over what is not wanted."""

        def read() -> None:
            at = 0
            blocks = {"block_size": 0} if _is_http(self.source) else {}
            with (
                self.source.fs.open(self.source.path, "rb", **blocks) as file,
                _Target(self.target) as target,
            ):
                while (stop is None or at < stop) and (piece := file.read(_STREAM)):
                    self.pause(0)
                    wanted = piece[max(0, start - at) : None if stop is None else stop - at]
                    target.write(max(at, start) - self.start, wanted)
                    at += len(piece)
            if stop is not None and at < stop:
                raise OSError(f"it ended at byte {at} of {stop}")

        self.source.ask("reading", read, self.pause)


def download(source: RemoteFile, target: str, start: int, stop: int | None) -> None:
    """Copy [start, stop) of a remote file (to its end, if None) into an existing local file.

    FileNotFoundError: it is absent. InputError: it ends before `stop`. OSError: the store, or the
    local disk, does not do it.
    """
    stop = version(source).size if stop is None else stop
    with ThreadPoolExecutor(THREADS, "download") as pool:
        copy = Download(source, start, stop, target, pool)
        try:
            copy.finish()
        finally:
            copy.cancel()


def fetch_pieces(source: RemoteFile, target: str, journal: str, size: int) -> None:
    """Copy a file of so many bytes into `target`, but for the pieces that `journal` has from earlier calls.

    Whoever calls must be alone at it, must check the content, and may then remove the journal. Errors as `download`.
    """
    done: set[str] = set()
    if os.path.exists(target) and os.path.exists(journal):
        with open(journal) as file:
            done = set(file.read().split("\n")[:-1])
    with open(target, "r+b" if done else "wb"), open(journal, "a" if done else "w") as log:

        def arrived(start: int, stop: int) -> None:
            os.write(log.fileno(), f"{start}-{stop}\n".encode())  # one call: it is there whole, or not at all

        with ThreadPoolExecutor(THREADS, "download") as pool:
            wanted = [piece for piece in pieces(0, size) if "{}-{}".format(*piece) not in done]
            copy = Download(source, 0, size, target, pool, arrived=arrived, wanted=wanted)
            try:
                copy.finish()
            finally:
                copy.cancel()
