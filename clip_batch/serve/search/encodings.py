"""The encoders of the served indices: each is loaded once, in a thread, and batches the queries of all its indices."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_batch.config import ServeConfig, parse_bytes
from clip_batch.errors import EncoderError, one_line
from clip_batch.serve.http.errors import Busy
from clip_batch.serve.http.responses import LATER
from clip_batch.serve.search.batching import Lane, TextCache, Vector
from clip_batch.serve.search.metrics import Metrics

if TYPE_CHECKING:
    from clip_batch.encoders.encoder import Model, Pixels
    from clip_batch.search.backend import Backend

PATIENCE = 10.0
"""Seconds that a request waits for an encoder that is being loaded."""

_LOADING = "its encoder is being loaded"


class Encoding:
    """An encoder with a lane for texts, a lane for images and a cache of text vectors."""

    def __init__(self, encoder: Model, config: ServeConfig, metrics: Metrics) -> None:
        self.encoder, self._metrics = encoder, metrics

        def timed(step: str, lane: str, encode: Callable[[Any], Any]) -> Callable[[list[Any]], Vector]:
            def run(items: list[Any]) -> Vector:
                metrics.batch.labels(lane).observe(len(items))
                with metrics.steps[step].time():
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
        """Return the vector (d,) of a text."""
        vector = self._cache.get(text)
        self._metrics.cache.labels("miss" if vector is None else "hit").inc()
        if vector is None:
            (vector,) = await self._texts.submit([text])
            self._cache.put(text, vector)
        return vector

    async def image(self, pixels: Pixels) -> Vector:
        """Return the vector (d,) of an image that the encoder's `preprocess` returned."""
        (vector,) = await self._images.submit([pixels])
        return vector

    def close(self) -> None:
        """End both lanes."""
        self._texts.close()
        self._images.close()


class Encodings:
    """Encodings by the encoder's fingerprint. Used on the event loop alone, so no lock is needed."""

    def __init__(self, config: ServeConfig, metrics: Metrics) -> None:
        self._config, self._metrics = config, metrics
        self._tasks: dict[str, asyncio.Task[Encoding]] = {}
        self._problems: dict[str, str] = {}

    async def get(self, searcher: Backend) -> Encoding:
        """Return the encoding of an index, for a request.

        Raises EncoderError at once if the encoder could not be loaded, also while that is tried again, and Busy if it
        is not loaded within `PATIENCE` seconds.
        """
        fingerprint = searcher.manifest.encoder.fingerprint
        if fingerprint in self._problems:
            raise EncoderError(self._problems[fingerprint])
        try:
            return await asyncio.wait_for(self.load(searcher), PATIENCE)
        except TimeoutError:
            raise Busy(f"index {searcher.manifest.version}: {_LOADING}", after=LATER) from None
        except OSError as error:
            raise EncoderError(one_line(error)) from None

    async def load(self, searcher: Backend) -> Encoding:
        """Return the encoding of an index once its encoder is loaded, which may take long.

        Raises EncoderError if the encoder is not available or is not the one that embedded the index.
        """
        fingerprint = searcher.manifest.encoder.fingerprint
        if fingerprint not in self._tasks:
            self._tasks[fingerprint] = asyncio.create_task(asyncio.to_thread(self._load, searcher))
            self._tasks[fingerprint].add_done_callback(functools.partial(self._note, fingerprint))
        return await asyncio.shield(self._tasks[fingerprint])

    def _note(self, fingerprint: str, task: asyncio.Task[Encoding]) -> None:
        """Note why an encoder could not be loaded, or that it is."""
        if task.cancelled() or (error := task.exception()) is None:
            self._problems.pop(fingerprint, None)
        else:
            self._problems[fingerprint] = one_line(error)

    def _load(self, searcher: Backend) -> Encoding:
        encoder, manifest = searcher.encoder, searcher.manifest
        if encoder.dim != manifest.dim:
            raise EncoderError(f"the encoder has {encoder.dim} dimensions, index {manifest.version} {manifest.dim}")
        if encoder.has_text:
            encoder.encode_texts(["warm up"])
        return Encoding(encoder, self._config, self._metrics)

    def reads_text(self, fingerprint: str) -> bool:
        """Whether the encoder has a text side; true as long as it is not loaded."""
        encoding = self._loaded(fingerprint)
        return encoding is None or encoding.encoder.has_text

    def problem(self, fingerprint: str) -> str | None:
        """Return why the encoder cannot be used yet, or None if it can."""
        if fingerprint in self._problems:
            return self._problems[fingerprint]
        return None if self._loaded(fingerprint) is not None else _LOADING

    def forget_failed(self) -> None:
        """Forget which encoders failed to load, so that `load` tries them again; what was wrong stays known."""
        for fingerprint, task in list(self._tasks.items()):
            if task.done() and task.exception():
                del self._tasks[fingerprint]

    def keep(self, fingerprints: Iterable[str]) -> None:
        """Close all encodings but those of `fingerprints`."""
        for fingerprint in set(self._tasks).difference(fingerprints):
            encoding = self._loaded(fingerprint)
            del self._tasks[fingerprint]
            self._problems.pop(fingerprint, None)
            if encoding is not None:
                encoding.close()

    def _loaded(self, fingerprint: str) -> Encoding | None:
        task = self._tasks.get(fingerprint)
        return task.result() if task is not None and task.done() and task.exception() is None else None
