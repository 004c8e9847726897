"""Thread pools for calls that would block the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from clip_batch.serve.http.errors import Busy

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """A pool of `count` threads that holds at most `limit` calls, running or waiting."""

    def __init__(self, name: str, count: int, limit: int) -> None:
        self._pool, self._name, self._limit, self._calls = ThreadPoolExecutor(count, name), name, limit, 0

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `call` returns in a thread, or raise what it raises. Raises Busy if the pool is full."""
        if self._calls >= self._limit:
            raise Busy(f"too many requests wait for {self._name}")
        self._calls += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, lambda: call(*args, **kwargs))
        finally:
            self._calls -= 1

    def close(self) -> None:
        """End the threads once their current calls return."""
        self._pool.shutdown(wait=False)
