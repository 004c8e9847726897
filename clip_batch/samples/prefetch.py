"""Fetching ahead: while one slice is embedded, the next ones are copied to this machine.

Local tars are read in place. A remote slice becomes a temporary file (in TMPDIR) that is deleted as soon as it is
mapped. A budget of bytes limits these files, but one slice ahead is always fetched.
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
from clip_batch.samples.fetch_process import Fetcher, opens_elsewhere
from clip_batch.storage.download import THREADS, Download
from clip_batch.storage.paths import absolute, is_local
from clip_batch.storage.transfer import CopyRange, copy_range, file_version, local_etag, remote_file
from clip_batch.types import Shard, Slice

LARGE = 16 * 2**20
"""Bytes from which a slice is fetched by a second process, which takes most of a second to start."""


class Prefetcher:
    """Local files of slices, fetched in the order in which they will be taken; a context manager.

    - `slices`: the slices, in that order; the next one is drawn when there is room for it.
    - `budget`: bytes of disk, the slice that is being read included.
    - `stop`: once set, nothing more is fetched, and `take` raises Preempted.
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
        self._fetches: deque[_Fetch] = deque()
        self._next: Slice | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._fetcher = Fetcher()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        while self._fetches:
            self._fetches.popleft().drop()
        self._fetcher.close()
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def take(self, piece: Slice) -> Iterator[tuple[str, int]]:
        """A local path that holds the slice, and the byte of the shard at which the file starts.

        Slices queued before this one are discarded. The file is deleted after the block, so map it there.

        InputError: the shard is missing, or its size or etag (the time of writing of a local one) is not as planned.
        OSError: the store does not answer, or the disk is full. Preempted: `stop` is set.
        """
        if is_local(piece.shard.url):
            path = absolute(piece.shard.url)
            found = os.stat(path)
            check_version(piece.shard, found.st_size, local_etag(found))
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
        while self._fetches:
            fetch = self._fetches.popleft()
            if fetch.piece is piece:
                return fetch
            fetch.drop()
        # It is not being fetched yet: it is the first slice, or the ones before it were skipped.
        while (candidate := self._peek()) is not None:
            self._next = None
            if candidate is piece:
                break
        return self._begin(piece)

    def _fill(self, held: int) -> None:
        """Start the next fetches, as far as there is room beside the `held` bytes."""
        held += sum(fetch.bytes for fetch in self._fetches)
        while (piece := self._peek()) is not None:
            held += _bytes(piece, self._budget)
            if self._fetches and held > self._budget:
                return
            self._next = None
            self._fetches.append(self._begin(piece))

    def _peek(self) -> Slice | None:
        """The next remote slice, which stays the next one."""
        while self._next is None and (piece := next(self._slices, None)) is not None:
            self._next = None if is_local(piece.shard.url) else piece
        return self._next

    def _begin(self, piece: Slice) -> _Fetch:
        self._pool = self._pool or ThreadPoolExecutor(THREADS, "download")
        size = _bytes(piece, self._budget)
        copy = self._fetcher.copy if size >= LARGE and opens_elsewhere(piece.shard.url) else copy_range
        return _Fetch(piece, self._options, size, self._pool, self._should_stop, copy)

    def _should_stop(self) -> bool:
        return self._closed or (self._stop is not None and self._stop.is_set())


class _Fetch:
    """The download of one slice; an error waits until the slice is taken."""

    def __init__(
        self,
        piece: Slice,
        options: dict[str, Any] | None,
        size: int,
        pool: ThreadPoolExecutor,
        should_stop: Callable[[], bool],
        copy: CopyRange,
    ) -> None:
        self.piece, self.bytes, self.path = piece, size, ""
        self._download: Download | None = None
        self._error: Exception | None = None
        url = piece.shard.url
        stop = piece.shard.size if piece.stop is None else piece.stop
        try:
            self._remote = remote_file(url, options)
            descriptor, self.path = tempfile.mkstemp(prefix="clip-batch-")
            os.close(descriptor)
            self._download = Download(
                self._remote, piece.start, stop, self.path, pool, should_stop, self._check, copy=copy
            )
        except Exception as error:
            self._error = error

    def finish(self) -> None:
        """Wait until the file is complete, and its version has been compared with the plan."""
        if self._error or not self._download:
            raise self._error or AssertionError
        try:
            self._download.finish()
        except (InputError, OSError, ValueError):
            self._check()  # a shard that changed fails in many ways: name the change
            raise

    def drop(self) -> None:
        """Stop the download and delete the file."""
        if self._download:
            self._download.cancel()
        if self.path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)

    def _check(self) -> None:
        """Check the version after the last byte, so that a change while the shard was read is noticed too."""
        pause = self._download.pause if self._download else time.sleep
        check_version(self.piece.shard, *file_version(self._remote, pause))


_REMEDY = "put that file back, or clip-batch repair --retry-failed changed embeds what is there"


def check_version(shard: Shard, size: int | None, etag: str | None) -> None:
    """InputError if a shard's size or etag is not as planned; None is unknown, and not compared."""
    if shard.size is not None and size is not None and size != shard.size:
        raise InputError(f"{shard.url} was planned with {shard.size} bytes and has {size} now: {_REMEDY}")
    if shard.etag is not None and etag is not None and etag != shard.etag:
        raise InputError(f"{shard.url} was planned with etag {shard.etag} and has {etag} now: {_REMEDY}")


def _bytes(piece: Slice, budget: int) -> int:
    """Bytes that a slice takes on the disk; the whole budget where its size is unknown."""
    stop = piece.shard.size if piece.stop is None else piece.stop
    return budget if stop is None else stop - piece.start
