"""The worker's one job, which runs in a thread. Requests for the same job share it; others are refused as Busy."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from clip_batch.serve.http.errors import Busy
from clip_batch.serve.http.requests import disconnected

T = TypeVar("T")

GRACE = 30.0
"""Seconds that a job may take to stop; embed stops after its current batch."""

AGAIN = 5
"""Seconds after which a client that was refused as Busy may ask again."""


@dataclass
class StageRequest:
    """A job. Jobs of equal `name` are the same work; `what` describes it to people; `stop` asks it to end.

    `waiting` clients wait for it. It is `kept` once a client was told to ask for its result again later.
    """

    name: Hashable
    what: str
    stop: threading.Event = field(default_factory=threading.Event)
    waiting: int = 0
    kept: bool = False
    future: asyncio.Future[Any] = field(init=False)


class Jobs:
    """The job of a worker, of which there is at most one at a time."""

    def __init__(self) -> None:
        self.now: StageRequest | None = None
        self._closing = False
        self._thread = ThreadPoolExecutor(1, "stage")

    async def run(
        self, name: Hashable, what: str, work: Callable[[threading.Event], T], request: Request, wait: float | None
    ) -> T | None:
        """Return what `work(stop)` returns, or None if that takes longer than `wait` seconds; the work then goes on.

        Raises what `work` raises, and Busy if another job is running or the worker is shutting down. If the last
        client that waits for a job disconnects, the job is stopped, unless a client was told to ask for it again.
        """
        if self._closing:
            raise Busy("this worker is shutting down: ask another one", after=AGAIN)
        job = self.now
        if job is None:
            job = self._start(StageRequest(name, what), work)
        elif job.name != name:
            raise Busy(f"this worker is busy: {job.what}", after=AGAIN)
        job.waiting += 1
        gone = asyncio.ensure_future(disconnected(request))
        try:
            done, _ = await asyncio.wait({job.future, gone}, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            if job.future in done:
                result: T = job.future.result()
                return result
            job.kept = job.kept or not done
            return None
        finally:
            gone.cancel()
            job.waiting -= 1
            if not job.waiting and not job.kept:
                job.stop.set()

    def _start(self, job: StageRequest, work: Callable[[threading.Event], object]) -> StageRequest:
        self.now = job
        job.future = asyncio.get_running_loop().run_in_executor(self._thread, work, job.stop)
        job.future.add_done_callback(self._ended)
        return job

    def _ended(self, future: asyncio.Future[Any]) -> None:
        self.now = None
        if not future.cancelled():
            future.exception()  # mark it as retrieved: nobody may be waiting any more, and asyncio would warn

    def stop(self) -> None:
        """Accept no more jobs, and ask the running one to stop."""
        self._closing = True
        if job := self.now:
            job.stop.set()

    async def close(self) -> None:
        """Stop, and wait up to GRACE seconds for the running job."""
        self.stop()
        if job := self.now:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(asyncio.shield(job.future), GRACE)
        self._thread.shutdown(wait=False)
