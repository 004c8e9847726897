"""Slots: which partitions are a worker's own, and which it may take from others once it has none left.

A slot says who begins with what, not who may: the commit decides. So a worker that is done helps the
slower ones that are at work now, from the far end of what they still have. It goes by their records,
which are hints: at worst two compute the same partition, and one of them in vain. Where there are many,
one reads them all and leaves what it saw for those who look soon after: a hint of hints, as old as a record may be.
"""

from __future__ import annotations

import functools
import json
import random
import time
from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

from clip_batch.embeddings import submission
from clip_batch.embeddings.commits import attempted, committed
from clip_batch.embeddings.workers import BEAT, SILENT, read_records
from clip_batch.errors import PlanError
from clip_batch.plan import paths
from clip_batch.plan.plan import count_partitions
from clip_batch.storage.store import Store

FEWEST = 3
"""Partitions that a worker must have left to be helped, where there are many who may look; a few take even the last.
With 1, and the last quarter of the longest list alone, a thousand workers computed 17 % twice; so 1.2 %, and the end
came sooner (tests/bench/laion.py)."""


MANY = 32
"""Records from which on a look is left for others: fewer are soon read."""


class Look(NamedTuple):
    """What each worker at work has left, less what others are at, as somebody saw it at `seen` (Unix seconds)."""

    seen: float
    left: list[list[int]]

    def less(self, number: int | None) -> Look:
        """Once somebody takes a partition."""
        return Look(self.seen, [[one for one in own if one != number] for own in self.left])


class Slot(NamedTuple):
    """Number `slot` of `slots` workers that share the plan, or of those of a `submission` (then `slots` is 0)."""

    slot: int
    slots: int = 0
    submission: str = ""


def partitions(store: Store, slot: Slot) -> list[int]:
    """The partitions of a slot, ascending. PlanError: there is no such slot, submission or plan."""
    return next(_dealt(store, [slot]))


def spare(store: Store, tried: set[int]) -> int | None:
    """A partition to take from a worker that is at work, but has not come to it; None where there is none.

    Never one of those `tried` here, nor one that failed anywhere, nor of a slot that nobody has begun: its task is
    still to come, with time of its own.
    """
    look, many = _last(store), True
    age = abs(time.time() - look.seen)
    if age >= BEAT:
        if age < SILENT:  # it will do for others until this one has looked
            _leave(store, look._replace(seen=time.time()))
        look, many = _look(store)
    number = choose(look.left, tried)
    if many:
        _leave(store, look.less(number))
    return number


def _look(store: Store) -> tuple[Look, bool]:
    """A look by oneself; and whether it read many records."""
    seen, every = time.time(), read_records(store)
    records = [record for record in every if record.alive]
    taken = committed(store) | attempted(store)
    taken.update(number for record in records for number in record.running)
    owned = _dealt(store, [Slot(*record.slot) for record in records if record.slot])
    return Look(seen, [[one for one in own if one not in taken] for own in owned]), len(every) > MANY


def _last(store: Store) -> Look:
    """What was left, or nothing, seen long ago."""
    try:
        return Look(**store.read_json(paths.LOOK))
    except (FileNotFoundError, TypeError, ValueError):  # absent, or what another version left
        return Look(0.0, [])


def _leave(store: Store, look: Look) -> None:
    store.replace(paths.LOOK, json.dumps(look._asdict()).encode())


def choose(owned: Iterable[Iterable[int]], taken: Container[int]) -> int | None:
    """The decision of `spare`: what each worker owns, less what is taken, to one partition, or None.

    One that its worker would come to late, of those who have nearly the most left, at random, as others may be looking
    too; nothing where all have few, which their workers come to before it is done elsewhere.
    """
    left = [[one for one in own if one not in taken] for own in owned]
    most = max(map(len, left), default=0)
    late = [one for own in left if 2 * len(own) >= most for one in own[len(own) // 2 :]]
    return random.choice(late) if most >= min(FEWEST, 1 + len(left) // 8) else None


def _dealt(store: Store, slots: Iterable[Slot]) -> Iterator[list[int]]:
    """The partitions of each slot; what they are dealt from is read once, however many slots."""
    load = functools.cache(functools.partial(submission.load, store))
    count = functools.cache(functools.partial(count_partitions, store))
    for slot in slots:
        if slot.submission:
            yield load(slot.submission).slot(slot.slot)
        elif 0 <= slot.slot < slot.slots:
            yield list(range(slot.slot, count(), slot.slots))
        else:
            raise PlanError(f"slot {slot.slot} of {slot.slots} does not exist: slots count from 0 to {slot.slots - 1}")
