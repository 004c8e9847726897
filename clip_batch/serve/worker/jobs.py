"""One job at a time, in a thread: a request for the same one waits for it too, any other is sent away."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from clip_batch.serve.http.errors import Busy

GRACE = 30.0
"""Seconds that a job is given to stop: embed ends after the batch it is at."""

AGAIN = 5
"""Seconds after which a client that found the worker busy may ask again."""


@dataclass
class StageRequest:
    """Work under a name; `stop` tells it to end. `kept` once a client was told to come back for it."""

    name: Hashable
    what: str
    stop: threading.Event = field(default_factory=threading.Event)
    waiting: int = 0
    kept: bool = False
    future: asyncio.Future[Any] = field(init=False)


class Jobs:
    """The one job of a worker, if it has any."""

    def __init__(self) -> None:
        self.now: StageRequest | None = None
        self._closing = False
        self._thread = ThreadPoolExecutor(1, "stage")

    async def run(
        self,
        name: Hashable,
        what: str,
        work: Callable[[threading.Event], dict[str, Any]],
        request: Request,
        wait: float | None,
    ) -> dict[str, Any] | None:
        """What `work(stop)` returns or raises; None if that takes longer than `wait` seconds, and it goes on.

        Busy: another job is at work, or the worker is ending. When the last client that waits for a job goes
        away, the job is stopped, unless one was told to come back for it.
        """
        if self._closing:
            raise Busy("this worker is ending: ask another one", after=AGAIN)
        job = self.now
        if job is None:
            job = self._start(StageRequest(name, what), work)
        elif job.name != name:
            raise Busy(f"this worker is at {job.what}", after=AGAIN)
        job.waiting += 1
        gone = asyncio.ensure_future(_gone(request))
        try:
            done, _ = await asyncio.wait({job.future, gone}, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            if job.future in done:
                found: dict[str, Any] = job.future.result()
                return found
            job.kept = job.kept or not done
            return None
        finally:
            gone.cancel()
            job.waiting -= 1
            if not job.waiting and not job.kept:
                job.stop.set()

    def _start(self, job: StageRequest, work: Callable[[threading.Event], dict[str, Any]]) -> StageRequest:
        self.now = job
        job.future = asyncio.get_running_loop().run_in_executor(self._thread, work, job.stop)
        job.future.add_done_callback(self._ended)
        return job

    def _ended(self, future: asyncio.Future[Any]) -> None:
        self.now = None
        if not future.cancelled():
            future.exception()  # it was told to whoever waited, if anyone did

    def stop(self) -> None:
        """Take no more jobs, and tell the one at work to stop."""
        self._closing = True
        if job := self.now:
            job.stop.set()

    async def close(self) -> None:
        """Stop, and wait for the job as long as it is given."""
        self.stop()
        if job := self.now:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(asyncio.shield(job.future), GRACE)
        self._thread.shutdown(wait=False)


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
