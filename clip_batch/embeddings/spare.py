"""Which partition a worker that has none left takes from a slower one.

It takes from the far end of what a slower worker still has, going by the workers' records. Those are hints: at worst
two workers compute the same partition, and one of them in vain, as the commit decides. With many workers, reading all
records takes long, so whoever has read them leaves a snapshot for the others (`look.json`), which is at most BEAT
seconds old; like the records, it is only a hint.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Container, Iterable
from typing import NamedTuple

from clip_batch.embeddings.attempts import attempted
from clip_batch.embeddings.commits import committed
from clip_batch.embeddings.slots import partitions_of
from clip_batch.embeddings.workers import BEAT, read_records
from clip_batch.plan import paths
from clip_batch.plan.state import SILENT
from clip_batch.storage.store import Store

FEWEST = 3
"""A worker is helped only if it has this many partitions left; with few workers (see `choose`), fewer.

With 1, and the last quarter of the longest list alone, a thousand workers computed 17 % twice; with 3, 1.2 %, and the
last commit came sooner (tests/bench/laion.py)."""

MANY = 32
"""With more records than this, a worker that has read them leaves a snapshot for the others."""


class Snapshot(NamedTuple):
    """A snapshot of what could be taken: for each live worker, its partitions that nobody is working on.

    `seen` is when the records were read, in Unix seconds.
    """

    seen: float
    left: list[list[int]]

    def less(self, number: int | None) -> Snapshot:
        """A copy without partition `number`."""
        return Snapshot(self.seen, [[one for one in own if one != number] for own in self.left])


def spare(store: Store, tried: set[int], planned: int) -> int | None:
    """A partition of a live worker that has not come to it; None where there is none to take.

    It is none of those `tried` here, none that failed anywhere, and none of a slot that nobody has begun: the task of
    that slot is still to come, with time of its own. It is one of the first `planned`, which this worker's plan has.
    """
    snapshot, many = _load(store), True
    age = abs(time.time() - snapshot.seen)
    if age >= BEAT:
        if age < SILENT:  # refresh its timestamp so that others use it while we replace it
            _save(store, snapshot._replace(seen=time.time()))
        snapshot, many = _read(store)
    number = choose([[one for one in own if one < planned] for own in snapshot.left], tried)
    if many:
        _save(store, snapshot.less(number))
    return number


def choose(left: Iterable[Iterable[int]], taken: Container[int]) -> int | None:
    """The partition to take, given what each worker has left and what is taken; None for none.

    It is one that its worker would come to late, drawn at random because others may be choosing too, from the workers
    that have nearly the most left. Where all have few left, none is taken: its worker would come to it before we
    finished it.
    """
    rest = [[number for number in own if number not in taken] for own in left]
    most = max(map(len, rest), default=0)
    late = [number for own in rest if 2 * len(own) >= most for number in own[len(own) // 2 :]]
    return random.choice(late) if most >= min(FEWEST, 1 + len(rest) // 8) else None


def _read(store: Store) -> tuple[Snapshot, bool]:
    """What is left now, by the records and the commits, and whether there are many records."""
    seen, records = time.time(), read_records(store)
    live = [record for record in records if record.alive]
    taken = committed(store) | attempted(store)
    taken.update(number for record in live for number in record.running)
    owned = partitions_of(store, [record.slot for record in live if record.slot])
    return Snapshot(seen, [[number for number in own if number not in taken] for own in owned]), len(records) > MANY


def _load(store: Store) -> Snapshot:
    """The snapshot that another worker left; one of 1970 where there is none that this version can read."""
    try:
        return Snapshot(**store.read_json(paths.LOOK))
    except (FileNotFoundError, TypeError, ValueError):
        return Snapshot(0.0, [])


def _save(store: Store, snapshot: Snapshot) -> None:
    store.replace(paths.LOOK, json.dumps(snapshot._asdict()).encode())
