"""A pool of decoding threads, of which only as many work as keep the encoder fed.

All threads share Python's lock. Those that decode sooner than is needed keep it from the threads that give a GPU its
work: on an H200 with 16 cores, 16 of them left the GPU idle half of the time, while they used two cores and a half.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from clip_batch.encoders.device import cores, use_torch_threads

P = ParamSpec("P")
R = TypeVar("R")

FIRST = 4
"""Threads that work at first."""


class Decoders:
    """A few threads at first, and as `widen` is called up to `threads` of them; 0: up to one for each core."""

    def __init__(self, threads: int) -> None:
        self._most = threads or cores()
        self._working = min(FIRST, self._most)
        self._places = threading.Semaphore(self._working)
        self._pool = ThreadPoolExecutor(self._most, "decode", use_torch_threads, (1,))

    def submit(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Have a thread do some work."""

        def run() -> R:
            with self._places:
                return work(*args, **kwargs)

        return self._pool.submit(run)

    def widen(self) -> None:
        """Let one more thread work, if there is one."""
        if self._working < self._most:
            self._working += 1
            self._places.release()

    def cancel(self) -> None:
        """Drop the work that no thread has begun; no other is taken."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
