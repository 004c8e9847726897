"""Runs many calls that wait for storage, in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

THREADS = 32
"""Requests in flight. It does not depend on the cores: a stat or a HEAD waits and hardly computes."""


def map_in_threads(call: Callable[[T], R], items: Sequence[T]) -> Iterable[R]:
    """`map` in threads, in order. Each task takes several items, so that a million items stay cheap."""
    step = max(1, min(256, len(items) // THREADS))
    with ThreadPoolExecutor(min(THREADS, len(items))) as pool:
        chunks = (items[at : at + step] for at in range(0, len(items), step))
        for results in pool.map(lambda chunk: [call(item) for item in chunk], chunks):
            yield from results
