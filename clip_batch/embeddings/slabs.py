"""Slabs: the memory for the pixels of a batch, which decoding threads fill and the encoder reads, again and again.

New memory would be cleared by the system and pinned by a GPU's driver, and a batch be gathered by one thread.
"""

from __future__ import annotations

import itertools
import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from clip_batch.encoders.device import host_array, host_batch
from clip_batch.errors import EncoderError

if TYPE_CHECKING:
    from clip_batch.encoders.encoder import Pixels


class Slab:
    """The pixels of up to `size` images, in the order in which they were added, which several threads may do."""

    def __init__(self, size: int, device: str) -> None:
        self._size, self._device = size, device
        self._lock = threading.Lock()
        self._places = itertools.count()
        self._pixels: Pixels | None = None

    def add(self, pixels: Pixels) -> int:
        """Copy the pixels of one image; its place among those of the batch. EncoderError: it has another shape."""
        with self._lock:
            if self._pixels is None:
                self._pixels = host_batch(pixels, self._size, self._device)
            place = next(self._places)
        if pixels.shape != self._pixels.shape[1:]:
            raise EncoderError(
                f"the model's preprocessing gives pixels of {self._pixels.shape[1:]} and of {pixels.shape}: "
                "take a model that gives all images one shape"
            )
        self._pixels[place] = pixels
        return place

    def pixels(self, count: int) -> Pixels:
        """The first `count` images, (count, 3, h, w), valid until the slab is reused."""
        assert self._pixels is not None
        return self._pixels[:count]

    def clear(self) -> None:
        """Forget the images, so that the memory serves another batch."""
        self._places = itertools.count()


class Slabs:
    """As many slabs of `size` images as are in use at the same time, in memory that the device copies quickly."""

    def __init__(self, size: int, device: str) -> None:
        self._size, self._device = size, device
        host_array((0,), "uint8", device)  # torch, if it is needed, is imported before there are threads
        self._free: SimpleQueue[Slab] = SimpleQueue()

    def take(self) -> Slab:
        """An empty slab."""
        try:
            return self._free.get_nowait()
        except Empty:
            return Slab(self._size, self._device)

    def give(self, slab: Slab) -> None:
        """Take back a slab that nobody reads or fills any more."""
        slab.clear()
        self._free.put(slab)
