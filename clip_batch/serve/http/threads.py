"""Threads for what would block the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from clip_batch.serve.http.errors import Busy

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """`count` threads; Busy where `most` calls are at work or waiting."""

    def __init__(self, name: str, count: int, most: int) -> None:
        self._pool, self._name, self._most, self._taken = ThreadPoolExecutor(count, name), name, most, 0

    async def run(self, call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """What `call` returns or raises."""
        if self._taken >= self._most:
            raise Busy(f"too many requests wait for {self._name}")
        self._taken += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, lambda: call(*arguments, **named))
        finally:
            self._taken -= 1

    def close(self) -> None:
        """End the threads, after what they are at."""
        self._pool.shutdown(wait=False)
