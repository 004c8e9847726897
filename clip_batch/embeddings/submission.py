"""A submission: the partitions that one `submit` handed to a scheduler, frozen in OUT/_clip_batch/submissions.

Slot i of a submission means the same partitions for ever, whatever is committed, retried or submitted later.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property

from clip_batch.embeddings.commits import committed
from clip_batch.errors import PlanError
from clip_batch.plan import paths
from clip_batch.plan.plan import count_partitions
from clip_batch.storage.store import Store
from clip_batch.types import format_numbers, parse_numbers

MOST_TASKS = 1000
"""The most tasks of a submission whose number of tasks is not given."""


@dataclass(frozen=True)
class Submission:
    """The partitions that were missing when it was made, dealt to `slots`; `command` submits again what is missing."""

    id: str
    scheduler: str
    created: str
    partitions: str
    slots: int
    command: str

    def slot(self, slot: int) -> list[int]:
        """The partitions of a slot, [] if there are more slots than partitions; PlanError if there is no such slot."""
        if not 0 <= slot < self.slots:
            raise PlanError(f"submission {self.id} has the slots 0 to {self.slots - 1}, not {slot}")
        return self._numbers[slot :: self.slots]

    @cached_property
    def _numbers(self) -> list[int]:
        return parse_numbers(self.partitions)


def missing(store: Store) -> list[int]:
    """The planned partitions of OUT that are not committed, ascending; PlanError if there is no plan."""
    return sorted(set(range(count_partitions(store))) - committed(store))


def draft(missing: list[int], scheduler: str, tasks: int, workers: int, command: str) -> Submission:
    """A submission of the missing partitions to `tasks` tasks of `workers` processes each.

    `tasks` 0 means one worker a partition, in at most `MOST_TASKS` tasks.
    """
    tasks = min(tasks or MOST_TASKS, -(-len(missing) // workers))
    now = datetime.now(UTC)
    id = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    created = now.isoformat(timespec="seconds")
    return Submission(id, scheduler, created, format_numbers(missing), tasks * workers, command)


def publish(store: Store, submission: Submission) -> None:
    """Write a submission to OUT, where it is never changed again."""
    store.create(paths.submission(submission.id), json.dumps(asdict(submission), indent=1).encode())


def load(store: Store, id: str) -> Submission:
    """A submission by its id; PlanError where there is none."""
    try:
        return Submission(**store.read_json(paths.submission(id)))
    except FileNotFoundError:
        known = ", ".join(ids(store)[-3:]) or "none"
        raise PlanError(f"no submission {id!r} at {store.url}: the latest are {known}") from None


def ids(store: Store) -> list[str]:
    """All submissions, the oldest first."""
    names = (name.removesuffix(".json") for name in store.list(paths.SUBMISSIONS))
    return [name for name in names if re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", name)]
