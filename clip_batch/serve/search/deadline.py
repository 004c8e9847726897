"""Work that ends when it has taken too long, or when the client that asked for it has gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request

from clip_batch.serve.http.errors import Refused
from clip_batch.serve.http.requests import disconnected


class Deadline:
    """The end of the time that work has, `seconds` after the first call of `check`, or at once if the client goes."""

    def __init__(self, seconds: float, what: str, field: str) -> None:
        self._seconds, self._what, self._field = seconds, what, field
        self._end: float | None = None
        self._gone = False

    def check(self) -> None:
        """Raise Refused (400) if the work is to end. Called in the thread that works."""
        if self._gone:
            raise Refused(400, "the client closed the connection")
        now = time.monotonic()
        if self._end is None:
            self._end = now + self._seconds
        if now > self._end:
            raise Refused(400, f"{self._field}: {self._what} takes more than {self._seconds:g} s here", self._field)

    @asynccontextmanager
    async def watching(self, request: Request) -> AsyncIterator[None]:
        """Within the block, notice that the client of a request, whose body was read, disconnects."""

        async def watch() -> None:
            await disconnected(request)
            self._gone = True

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()
