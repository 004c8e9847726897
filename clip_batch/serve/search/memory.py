"""A bound of the memory that decoding images takes at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from clip_batch.errors import DecodeError
from clip_batch.samples import sizes
from clip_batch.samples.decode import read_header


class DecodeMemory:
    """`limit` bytes that threads share: an image that needs more is refused, others wait for those before."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._freed = threading.Condition()

    @contextmanager
    def reserved(self, data: bytes, max_pixels: int) -> Iterator[None]:
        """Within the block, have as much memory as an image needs by its header. DecodeError: it is too large."""
        image = read_header(data, max_pixels)
        # A copy as RGB takes four bytes a pixel besides those of the image.
        needed = max(sizes.decoding_memory(image), 8 * image.width * image.height)
        if needed > self._limit:
            size = f"{image.width} x {image.height} in {image.format}"
            raise DecodeError("too_many_pixels", f"{size} needs {needed:,} bytes, more than {self._limit:,}")
        with self._freed:
            self._freed.wait_for(lambda: self._used + needed <= self._limit)
            self._used += needed
        try:
            yield
        finally:
            with self._freed:
                self._used -= needed
                self._freed.notify_all()
