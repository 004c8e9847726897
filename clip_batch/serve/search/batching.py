"""Dynamic batching: queries that arrive at about the same time are encoded in one batch.

A lane encodes one batch at a time in its own thread; the queries that arrive meanwhile form the next batch.
Everything else runs on the event loop, so no lock is needed.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from clip_batch.serve.http.errors import Busy

T = TypeVar("T")
Vector = npt.NDArray[np.float32]


class Lane(Generic[T]):
    """A queue of items in front of `encode`, which turns a list of them into float32 (n, d).

    A batch has at most `batch` items; its first item waits up to `wait` seconds for others. At most `queue` items wait.
    """

    def __init__(self, encode: Callable[[list[T]], Vector], batch: int, wait: float, queue: int) -> None:
        self._encode, self._batch, self._wait, self._queue = encode, batch, wait, queue
        self._waiting: deque[tuple[T, asyncio.Future[Vector]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "encode")

    async def submit(self, items: Sequence[T]) -> list[Vector]:
        """Return the vector (d,) of each item. Raises Busy if the queue is full, or what `encode` raises."""
        if len(self._waiting) + len(items) > self._queue:
            raise Busy("too many queries wait for the encoder")
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Vector]] = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return await asyncio.gather(*futures)

    async def _drain(self) -> None:
        if self._wait and len(self._waiting) < self._batch:
            await asyncio.sleep(self._wait)
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
            # The future of a request whose client went away is done already.
            await self._settle([(item, future) for item, future in taken if not future.done()])

    async def _settle(self, batch: list[tuple[T, asyncio.Future[Vector]]]) -> None:
        """Encode a batch and resolve its futures. If the batch fails, each item is tried by itself."""
        if not batch:
            return
        loop = asyncio.get_running_loop()
        try:
            vectors = await loop.run_in_executor(self._thread, self._encode, [item for item, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                if not batch[0][1].done():
                    batch[0][1].set_exception(error)
                return
            for pair in batch:
                await self._settle([pair])
            return
        for (_, future), vector in zip(batch, vectors, strict=True):
            if not future.done():
                future.set_result(vector)

    def close(self) -> None:
        """End the thread once its current batch is encoded."""
        self._thread.shutdown(wait=False)


class TextCache:
    """Vectors of texts. When they take more than `limit` bytes, the least recently used are dropped."""

    _OVERHEAD = 300
    """Approximate bytes of Python objects for each entry."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._vectors: OrderedDict[str, Vector] = OrderedDict()

    def get(self, text: str) -> Vector | None:
        """Return the vector of `text`, or None if it is not cached."""
        vector = self._vectors.get(text)
        if vector is not None:
            self._vectors.move_to_end(text)
        return vector

    def put(self, text: str, vector: Vector) -> None:
        """Store the vector of `text`."""
        if text in self._vectors:
            return
        self._vectors[text] = vector
        self._size += self._cost(text, vector)
        while self._size > self._limit:
            self._size -= self._cost(*self._vectors.popitem(last=False))

    def _cost(self, text: str, vector: Vector) -> int:
        return 4 * len(text) + vector.nbytes + self._OVERHEAD
