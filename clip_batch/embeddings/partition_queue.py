"""The partitions that a worker goes through, in order; more may be added at the end, and the rest reordered."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

from clip_batch.types import Partition


class PartitionQueue:
    """The given partitions in order, then those that `more` returns, until it returns None.

    Several threads may iterate over it, each from the start: one prefetches what another will read.
    """

    def __init__(self, partitions: list[Partition], more: Callable[[], Partition | None]) -> None:
        self._partitions, self._more, self._reached = list(partitions), more, 0
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Partition]:
        place = 0
        while (partition := self._at(place)) is not None:
            yield partition
            place += 1

    def _at(self, place: int) -> Partition | None:
        with self._lock:
            if place == len(self._partitions):
                if (partition := self._more()) is None:
                    return None
                self._partitions.append(partition)
            self._reached = max(self._reached, place + 1)
            return self._partitions[place]

    def jump(self) -> None:
        """Continue from a random place in what no thread has reached, because another worker works at this place.

        Otherwise workers that go through one plan in the same order would compute the same partitions side by side to
        its end, and the slower one would lose every race to commit.
        """
        with self._lock:
            rest = self._partitions[self._reached :]
            if rest:
                place = random.randrange(len(rest))
                self._partitions[self._reached :] = rest[place:] + rest[:place]
