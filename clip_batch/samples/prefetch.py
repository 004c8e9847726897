"""Reading ahead: while one slice is embedded, the next ones are on their way to this machine.

Local tars stay where they are. A remote slice becomes a temporary file (in TMPDIR) that is deleted as
soon as it is mapped. How much may lie there is a budget of bytes; one slice ahead is always fetched.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from clip_batch.errors import InputError
from clip_batch.samples.fetch_process import Fetcher, apart
from clip_batch.storage.download import THREADS, Download
from clip_batch.storage.paths import absolute, is_local
from clip_batch.storage.transfer import CopyRange, copy_range, file_version, remote_file
from clip_batch.types import Shard, Slice

LARGE = 16 * 2**20
"""Bytes of a slice that is worth a process to fetch it; most of a second goes by until that one reads."""


class Prefetcher:
    """Local files of slices, in the order in which they will be taken; a context manager.

    `slices` is asked for the next one only when there is room for it. `budget` is in bytes, the
    slice in hand included. Once `stop` is set, nothing more is fetched and `take` raises Preempted.
    """

    def __init__(
        self,
        slices: Iterable[Slice] = (),
        options: dict[str, Any] | None = None,
        budget: int = 0,
        stop: threading.Event | None = None,
    ) -> None:
        self._slices, self._options, self._budget, self._stop = iter(slices), options, budget, stop
        self._closed = False
        self._coming: deque[_Fetch] = deque()
        self._following: Slice | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._fetcher = Fetcher()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        while self._coming:
            self._coming.popleft().drop()
        self._fetcher.close()
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def take(self, piece: Slice) -> Iterator[tuple[str, int]]:
        """A local path that holds the slice, and the byte of the shard that it starts with.

        What comes before the slice is given up. The file is gone after the block, so map it there.
        InputError: the shard is missing or another than planned, by size or (remote) etag; OSError:
        the store does not answer, or the disk is full; Preempted.
        """
        if is_local(piece.shard.url):
            path = absolute(piece.shard.url)
            check(piece.shard, os.path.getsize(path), None)
            yield path, 0
            return
        fetch = self._find(piece)
        try:
            self._fill(fetch.bytes)
            fetch.finish()
            yield fetch.path, piece.start
        finally:
            fetch.drop()

    def _find(self, piece: Slice) -> _Fetch:
        while self._coming:
            fetch = self._coming.popleft()
            if fetch.piece is piece:
                return fetch
            fetch.drop()
        # Not begun: it is the first, or those before it were given up.
        while (following := self._peek()) is not None:
            self._following = None
            if following is piece:
                break
        return self._begin(piece)

    def _fill(self, held: int) -> None:
        """Begin what comes next, as far as there is room."""
        held += sum(fetch.bytes for fetch in self._coming)
        while (piece := self._peek()) is not None:
            held += _bytes(piece, self._budget)
            if self._coming and held > self._budget:
                return
            self._following = None
            self._coming.append(self._begin(piece))

    def _peek(self) -> Slice | None:
        """The next remote slice, left where it is."""
        while self._following is None and (piece := next(self._slices, None)) is not None:
            self._following = None if is_local(piece.shard.url) else piece
        return self._following

    def _begin(self, piece: Slice) -> _Fetch:
        self._pool = self._pool or ThreadPoolExecutor(THREADS, "download")
        size = _bytes(piece, self._budget)
        copy = self._fetcher.copy if size >= LARGE and apart(piece.shard.url) else copy_range
        return _Fetch(piece, self._options, size, self._pool, self._stopped, copy)

    def _stopped(self) -> bool:
        return self._closed or (self._stop is not None and self._stop.is_set())


class _Fetch:
    """One slice on its way; an error of its own waits until the slice is wanted."""

    def __init__(
        self,
        piece: Slice,
        options: dict[str, Any] | None,
        size: int,
        pool: ThreadPoolExecutor,
        stopped: Callable[[], bool],
        copy: CopyRange,
    ) -> None:
        self.piece, self.bytes, self.path = piece, size, ""
        self._download: Download | None = None
        self._error: Exception | None = None
        url = piece.shard.url
        stop = piece.shard.size if piece.stop is None else piece.stop
        try:
            self._source = remote_file(url, options)
            descriptor, self.path = tempfile.mkstemp(prefix="clip-batch-")
            os.close(descriptor)
            self._download = Download(self._source, piece.start, stop, self.path, pool, stopped, self._check, copy=copy)
        except Exception as error:
            self._error = error

    def finish(self) -> None:
        """Wait until the file is whole, and known to be of the planned version."""
        if self._error or not self._download:
            raise self._error or AssertionError
        try:
            self._download.finish()
        except (InputError, OSError, ValueError):
            self._check()  # a shard that is another now fails in ways of its own
            raise

    def drop(self) -> None:
        if self._download:
            self._download.cancel()
        if self.path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)

    def _check(self) -> None:
        """Behind the last byte: what is planned and stands now has not changed while it was read."""
        pause = self._download.pause if self._download else time.sleep
        check(self.piece.shard, *file_version(self._source, pause))


def check(shard: Shard, size: int | None, etag: str | None) -> None:
    """InputError unless a shard is what was planned, as far as plan and store tell."""
    if shard.size is not None and size is not None and size != shard.size:
        raise InputError(f"{shard.url} was planned with {shard.size} bytes and has {size} now; plan again")
    if shard.etag is not None and etag is not None and etag != shard.etag:
        raise InputError(f"{shard.url} was planned with etag {shard.etag} and has {etag} now; plan again")


def _bytes(piece: Slice, budget: int) -> int:
    """What a slice takes on the disk; where no one knows, all there is."""
    stop = piece.shard.size if piece.stop is None else piece.stop
    return budget if stop is None else stop - piece.start
