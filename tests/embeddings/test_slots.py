"""Slots: which partitions a worker starts with, and how often the plan and the submissions are read for it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from clip_batch.embeddings import submission
from clip_batch.embeddings.slots import Slot, partitions, partitions_of
from clip_batch.errors import PlanError
from clip_batch.storage.store import Store
from tests import fabricated


class CountingStore(Store):
    """Counts the reads of each file."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads = Counter[str]()

    def read(self, name: str) -> bytes:
        self.reads[name] += 1
        return super().read(name)


def test_the_slots_of_a_plan_share_all_its_partitions(tmp_path: Path) -> None:
    fabricated.make_plan(tmp_path, 10)
    store = CountingStore(str(tmp_path))
    assert partitions(store, Slot(1, 4)) == [1, 5, 9]
    store.reads.clear()
    shares = list(partitions_of(store, [Slot(slot, 4) for slot in range(4)]))
    assert sorted(number for share in shares for number in share) == list(range(10))
    assert list(store.reads.values()) == [1], "the plan is read once"


def test_the_slots_of_a_submission_share_what_was_missing(tmp_path: Path) -> None:
    fabricated.make_plan(tmp_path, 10)
    store = CountingStore(str(tmp_path))
    draft = submission.draft([2, 3, 7, 9], "slurm", 2, 1, "")
    submission.publish(store, draft)
    slots = [Slot(slot, submission=draft.id) for slot in range(2)]
    assert list(partitions_of(store, slots)) == [[2, 7], [3, 9]]
    assert list(store.reads.values()) == [1], "the submission is read once"


@pytest.mark.parametrize("slot", [Slot(4, 4), Slot(-1, 4), Slot(0, 0), Slot(0, submission="20260101-000000-abcdef")])
def test_a_slot_that_does_not_exist_is_refused(slot: Slot, tmp_path: Path) -> None:
    fabricated.make_plan(tmp_path, 10)
    with pytest.raises(PlanError, match=r"slot|submission"):
        partitions(Store(str(tmp_path)), slot)
