"""Downloads: a remote file copied to this machine in pieces, several at once, that may be resumed.

Memory is bounded by the threads that read: one piece each.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from clip_batch.errors import Preempted
from clip_batch.storage.transfer import CopyRange, RemoteFile, TargetFile, copy_range, file_version, has_ranges

PIECE = 16 * 2**20
"""Bytes of one ranged read: long enough that a round trip of 30 ms costs little."""

THREADS = 4
"""Reads at once, each with a piece in memory; an object store gives one connection 50 to 100 MB/s."""

_STREAM_READ = 2**20  # bytes
_POLL = 0.25  # seconds until `should_stop` is asked again


def download(remote: RemoteFile, target: str, start: int, stop: int | None) -> None:
    """Copy the bytes [start, stop) of a remote file (to its end, if None) into an existing local file.

    FileNotFoundError: the file is absent. InputError: it ends before `stop`. OSError: the store does not answer, or
    the local disk is full.
    """
    stop = file_version(remote).size if stop is None else stop
    with ThreadPoolExecutor(THREADS, "download") as pool:
        _complete(Download(remote, start, stop, target, pool))


def fetch_pieces(remote: RemoteFile, target: str, journal: str, size: int) -> None:
    """Copy a file of `size` bytes into `target`, except the pieces that `journal` lists from earlier calls.

    Only one caller may do so at a time. The caller checks the content and then removes the journal. Errors as
    `download`.
    """
    done: set[str] = set()
    if os.path.exists(target) and os.path.exists(journal):
        with open(journal) as file:
            done = set(file.read().split("\n")[:-1])
    with open(target, "r+b" if done else "wb"), open(journal, "a" if done else "w") as log:

        def record(start: int, stop: int) -> None:
            os.write(log.fileno(), f"{start}-{stop}\n".encode())  # one call, so that a line is whole or absent

        missing = [piece for piece in pieces(0, size) if "{}-{}".format(*piece) not in done]
        with ThreadPoolExecutor(THREADS, "download") as pool:
            _complete(Download(remote, 0, size, target, pool, on_piece=record, missing=missing))


def pieces(start: int, stop: int, size: int = PIECE) -> list[tuple[int, int]]:
    """Cut [start, stop) into ranges of `size`, in order; the last one may be shorter."""
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


class Download:
    """The bytes [start, stop) of a remote file on their way into the existing local file `target`.

    `stop` None means to the end. The pieces run on the threads of `pool`, in any order.

    - `should_stop`: once it returns True, no piece begins and every pause ends.
    - `on_complete`: called after the last piece, on its thread.
    - `on_piece`: called with the start and stop of each piece after it was copied.
    - `missing`: the pieces to copy; None for all.
    - `copy`: copies one piece.
    """

    def __init__(
        self,
        remote: RemoteFile,
        start: int,
        stop: int | None,
        target: str,
        pool: ThreadPoolExecutor,
        should_stop: Callable[[], bool] = lambda: False,
        on_complete: Callable[[], object] = lambda: None,
        on_piece: Callable[[int, int], object] = lambda start, stop: None,
        missing: Sequence[tuple[int, int]] | None = None,
        copy: CopyRange = copy_range,
    ) -> None:
        self._remote, self._start, self._target, self._copy = remote, start, target, copy
        self._should_stop, self._on_complete, self._on_piece = should_stop, on_complete, on_piece
        self._lock = threading.Lock()
        if stop is None or not has_ranges(remote):
            self._left = 1
            self._tasks = [pool.submit(self._run, self._stream, start, stop)]
        else:
            missing = pieces(start, stop) if missing is None else missing
            missing = missing or [(start, start)]
            self._left = len(missing)
            self._tasks = [pool.submit(self._run, self._piece, *piece) for piece in missing]

    def finish(self) -> None:
        """Wait for the last byte and `on_complete`. Raises the first error, or Preempted."""
        unfinished: set[Future[None]] = set(self._tasks)
        while unfinished:
            done, unfinished = wait(unfinished, _POLL, FIRST_EXCEPTION)
            if self._should_stop():
                raise Preempted()
            for task in done:
                task.result()

    def cancel(self) -> None:
        """Let no other piece begin."""
        for task in self._tasks:
            task.cancel()

    def pause(self, seconds: float) -> None:
        """Sleep; Preempted soon after `should_stop` returns True."""
        until = time.monotonic() + seconds
        while not self._should_stop():
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
            self._on_complete()

    def _piece(self, start: int, stop: int) -> None:
        self._copy(self._remote, start, stop, self._target, start - self._start, self.pause)
        self._on_piece(start, stop)

    def _stream(self, start: int, stop: int | None) -> None:
        """Read the file from its first byte in one request, and write only the range."""

        def read() -> None:
            at = 0
            blocks = {"block_size": 0} if self._remote.is_http else {}
            with self._remote.fs.open(self._remote.path, "rb", **blocks) as file, TargetFile(self._target) as target:
                while (stop is None or at < stop) and (data := file.read(_STREAM_READ)):
                    self.pause(0)
                    in_range = data[max(0, start - at) : None if stop is None else stop - at]
                    target.write(max(at, start) - self._start, in_range)
                    at += len(data)
            if stop is not None and at < stop:
                raise OSError(f"it ended at byte {at} of {stop}")

        self._remote.call("reading", read, self.pause)


def _complete(copy: Download) -> None:
    try:
        copy.finish()
    finally:
        copy.cancel()
