"""Slots: the partitions that a worker starts with, given two integers, or its place in a submission.

A slot does not reserve its partitions; the commit decides. See `spare` for those a worker takes from others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from clip_batch.embeddings import submission
from clip_batch.errors import PlanError
from clip_batch.plan.plan import count_partitions
from clip_batch.storage.store import Store


class Slot(NamedTuple):
    """Number `slot` of `slots` workers that share the plan, or of those of a `submission` (`slots` is 0 then)."""

    slot: int
    slots: int = 0
    submission: str = ""


def partitions(store: Store, slot: Slot) -> list[int]:
    """The partitions of a slot, ascending. PlanError: there is no such slot, submission or plan."""
    return next(partitions_of(store, [slot]))


def partitions_of(store: Store, slots: Iterable[Slot]) -> Iterator[list[int]]:
    """The partitions of each slot. The plan, and each submission, is read once, however many slots there are."""
    load = functools.cache(functools.partial(submission.load, store))
    count = functools.cache(functools.partial(count_partitions, store))
    for slot in slots:
        if slot.submission:
            yield load(slot.submission).slot(slot.slot)
        elif 0 <= slot.slot < slot.slots:
            yield list(range(slot.slot, count(), slot.slots))
        else:
            raise PlanError(f"slot {slot.slot} of {slot.slots} does not exist: slots count from 0 to {slot.slots - 1}")
