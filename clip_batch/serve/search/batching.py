"""Dynamic batching: queries that arrive together are encoded together, in lanes of texts and of images.

A lane encodes one batch at a time in a thread of its own; what arrives meanwhile is the next batch. All
but that thread runs on the event loop, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from clip_batch.serve.http.errors import Busy

if TYPE_CHECKING:
    from clip_batch.config import ServeConfig
    from clip_batch.encoders import Encoder, Pixels
    from clip_batch.serve.http.metrics import Metrics

T = TypeVar("T")
Vector = npt.NDArray[np.float32]


class Lane(Generic[T]):
    """`encode` of up to `most` items at once, float32 (n, d); the first of them waits `wait` seconds for more.

    More than `queue` items waiting: Busy.
    """

    def __init__(self, encode: Callable[[list[T]], Vector], most: int, wait: float, queue: int) -> None:
        self._encode, self._most, self._wait, self._limit = encode, most, wait, queue
        self._waiting: deque[tuple[T, asyncio.Future[Vector]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "encode")

    async def submit(self, items: Sequence[T]) -> list[Vector]:
        """The vector (d,) of each item; what `encode` raises for one."""
        if len(self._waiting) + len(items) > self._limit:
            raise Busy("too many queries wait for the encoder")
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Vector]] = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return await asyncio.gather(*futures)

    async def _drain(self) -> None:
        if self._wait and len(self._waiting) < self._most:
            await asyncio.sleep(self._wait)
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            batch = [(item, future) for item, future in taken if not future.done()]  # its request may be gone
            await self._settle(batch)

    async def _settle(self, batch: list[tuple[T, asyncio.Future[Vector]]]) -> None:
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
            for one in batch:  # so that a query that cannot be encoded fails alone
                await self._settle([one])
            return
        for (_, future), vector in zip(batch, vectors, strict=True):
            if not future.done():
                future.set_result(vector)

    def close(self) -> None:
        """End the thread, after the batch that is in it."""
        self._thread.shutdown(wait=False)


class TextCache:
    """Vectors of texts, the least recently asked leaving first when they take more than `limit` bytes."""

    _OVERHEAD = 300
    """Bytes of Python objects an entry, about."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._kept: OrderedDict[str, Vector] = OrderedDict()

    def get(self, text: str) -> Vector | None:
        found = self._kept.get(text)
        if found is not None:
            self._kept.move_to_end(text)
        return found

    def put(self, text: str, vector: Vector) -> None:
        if text in self._kept:
            return
        self._kept[text] = vector
        self._size += self._cost(text, vector)
        while self._size > self._limit:
            self._size -= self._cost(*self._kept.popitem(last=False))

    def _cost(self, text: str, vector: Vector) -> int:
        return 4 * len(text) + vector.nbytes + self._OVERHEAD


class Encoding:
    """An encoder with its two lanes and its cache; indices of one encoder share one."""

    def __init__(self, encoder: Encoder, config: ServeConfig, metrics: Metrics) -> None:
        from clip_batch.config import parse_bytes

        self.encoder, self._metrics = encoder, metrics

        def timed(name: str, lane: str, encode: Callable[[Any], Any]) -> Callable[[list[Any]], Vector]:
            def run(items: list[Any]) -> Vector:
                metrics.batch.labels(lane).observe(len(items))
                with metrics.steps[name].time():
                    vectors: Vector = encode(items)
                return vectors

            return run

        texts = timed("text_clip_inference_time", "text", encoder.encode_texts)
        images = timed("image_clip_inference_time", "image", lambda items: encoder.encode_images(np.stack(items)))
        settings = config.query_batch, config.query_wait / 1000, config.max_pending * config.max_queries
        self._texts: Lane[str] = Lane(texts, *settings)
        self._images: Lane[Pixels] = Lane(images, *settings)
        self._cache = TextCache(parse_bytes(config.text_cache))

    async def text(self, text: str) -> Vector:
        """The vector (d,) of a text."""
        found = self._cache.get(text)
        self._metrics.cache.labels("miss" if found is None else "hit").inc()
        if found is None:
            (found,) = await self._texts.submit([text])
            self._cache.put(text, found)
        return found

    async def image(self, pixels: Pixels) -> Vector:
        """The vector (d,) of an image as the encoder's `preprocess` left it."""
        (found,) = await self._images.submit([pixels])
        return found

    def close(self) -> None:
        """End both lanes."""
        self._texts.close()
        self._images.close()
