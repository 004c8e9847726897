"""A submission is frozen: its slots tile what was missing, whatever comes later."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_batch.cli import main
from clip_batch.embeddings import submission
from clip_batch.errors import PlanError
from clip_batch.storage.store import Store
from tests import fabricated


@given(st.sets(st.integers(0, 5000), min_size=1), st.integers(0, 300), st.integers(1, 9))
def test_slots_tile_what_was_missing(missing: set[int], tasks: int, workers: int) -> None:
    made = submission.draft(sorted(missing), "slurm", tasks, workers, "")
    dealt = [made.slot(slot) for slot in range(made.slots)]
    assert sorted(number for numbers in dealt for number in numbers) == sorted(missing)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert made.slots % workers == 0
    assert made.slots // workers <= (tasks or submission.MOST_TASKS)
    with pytest.raises(PlanError, match=f"slots 0 to {made.slots - 1}"):
        made.slot(made.slots)


def test_it_is_published_once_and_read_back(out: str) -> None:
    store = Store(out)
    made = [submission.draft(list(range(count)), "spark", 2, 1, f"again {count}") for count in (3, 5)]
    for one in made:
        submission.publish(store, one)
    assert [submission.load(store, one.id) for one in made] == made
    assert submission.ids(store) == sorted(one.id for one in made)
    with pytest.raises(PlanError, match=r"no submission 'x'.*the latest are \d{8}-"):
        submission.load(store, "x")


def test_a_worker_takes_its_slot_of_a_submission(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    fabricated.make_plan(out, 4)
    made = submission.draft([1, 3], "slurm", 2, 1, "")
    submission.publish(Store(out), made)
    worker = ["worker", "--output", out, "--submission", made.id]
    assert main([*worker, "--slot", "2"]) == 2
    assert main([*worker, "--slot", "0", "--slots", "2"]) == 2
    assert main(worker) == 2
    assert "--submission ID" in capsys.readouterr().err


def test_nothing_missing_is_nothing_to_do() -> None:
    assert submission.draft([], "slurm", 0, 4, "").slots == 0
