"""A second process that copies remote byte ranges: in the reading process each packet would wait for Python's lock.

Both processes copy with `clip_batch.storage.transfer.copy_range`. Requests and answers are pickled over pipes, so
that nobody else sees the store's options, and the process ends with the one that started it.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any

from clip_batch.storage.download import THREADS
from clip_batch.storage.paths import REFUSING
from clip_batch.storage.retry import Sleep
from clip_batch.storage.transfer import RemoteFile, copy_range, remote_file

_POLL = 0.25  # seconds between calls of `sleep`, which may raise to stop

_SETTINGS = {
    # glibc reuses the memory of one piece for the next; new pages cost as much as reading into them.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 2**20),
    "TOKIO_WORKER_THREADS": "1",  # hdfs-native: more threads would wake each other for every packet
}


class _ProcessEnded(Exception):
    """The process ended, or could not be started."""


def opens_elsewhere(url: str) -> bool:
    """Whether another process can open a URL too; not if this program registered the filesystem itself."""
    return url.partition("://")[0] in (*REFUSING, "http", "https")


class Fetcher:
    """Copies ranges in a second process, which the first call starts; if that ends too soon, in this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = count()
        self._answers: dict[int, Future[None]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: threading.Thread | None = None
        self._closed = False

    def copy(self, remote: RemoteFile, start: int, stop: int, target: str, at: int, sleep: Sleep = time.sleep) -> None:
        """As `clip_batch.storage.transfer.copy_range`; `sleep` is called four times a second, and may raise."""
        try:
            answer = self._send(remote.url, remote.options, start, stop, target, at)
            while not futures.wait([answer], _POLL).done:
                sleep(0)
            answer.result()
        except _ProcessEnded:
            sleep(0)
            copy_range(remote, start, stop, target, at, sleep)

    def close(self) -> None:
        """End the process at once."""
        with self._lock:
            self._closed = True
            if self._process:
                self._process.kill()
        if self._listener:
            self._listener.join()

    def _send(self, *request: object) -> Future[None]:
        answer: Future[None] = Future()
        with self._lock:
            try:
                if self._closed:
                    raise _ProcessEnded
                if self._process is None:
                    self._process = _start()
                    self._listener = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
                    self._listener.start()
                assert self._process.stdin
                number = next(self._numbers)
                self._answers[number] = answer
                pickle.dump((number, *request), self._process.stdin)
                self._process.stdin.flush()
            except OSError:
                self._closed = True
                raise _ProcessEnded from None
        return answer

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin and process.stdout
        with contextlib.suppress(Exception), process.stdout:  # also errors that cannot be unpickled
            while True:
                number, error = pickle.load(process.stdout)
                answer = self._answers.pop(number)
                answer.set_exception(error) if error else answer.set_result(None)
        with self._lock:
            self._closed = True
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):
                process.stdin.close()
            for answer in self._answers.values():
                answer.set_exception(_ProcessEnded())


def _start() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    command = [sys.executable, "-P", "-m", "clip_batch.samples.fetch_process"]
    environment = {**_SETTINGS, **os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def main() -> None:
    """Answer the requests on standard input until it is closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # sent to both; the parent decides
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)  # slices that are here come first
    answers, lock = os.fdopen(os.dup(1), "wb"), threading.Lock()
    os.dup2(2, 1)  # standard output belongs to answers; what libraries print goes to standard error

    def serve(number: int, url: str, options: dict[str, Any], *request: Any) -> None:
        error = None
        try:
            copy_range(remote_file(url, options), *request)
        except Exception as caught:
            error = caught
        try:
            answer = io.BytesIO()
            pickle.dump((number, error), answer)
        except Exception:
            os._exit(1)
        with lock:
            answers.write(answer.getvalue())
            answers.flush()

    with ThreadPoolExecutor(THREADS) as pool:
        with contextlib.suppress(EOFError):
            while True:
                pool.submit(serve, *pickle.load(sys.stdin.buffer))
        os._exit(0)


if __name__ == "__main__":
    main()
