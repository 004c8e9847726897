"""The progress of a pass over a dataset: the numbers of its `state_dict`, which stream and loader keep up to date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clip_batch.export.dataset import deal
from clip_batch.export.dataset.failures import Failures


@dataclass
class PassProgress:
    """The progress of a pass: how many positions its workers have read, and the rows that failed.

    `max_failures` is the largest share (0 to 1) of failed rows. `phases` says, for each phase, how many of its
    positions each worker has read (see `deal`); the last phase is the current one. `next` is the worker whose batch
    comes next.
    """

    max_failures: float
    phases: list[list[int]] = field(default_factory=list)
    next: int = 0
    failures: Failures = field(default_factory=Failures)
    _resumed: bool = False

    def begin(self, workers: int) -> tuple[list[list[int]], list[int]]:
        """Begin a pass with that many workers, from the loaded state if there is one, otherwise from the start.

        Returns the phases that are over, and the current one, whose counts the reader keeps up to date.
        """
        phases, self._resumed = self.phases if self._resumed else [], False
        over, positions_read = deal.begin(phases, workers)
        if not phases or len(phases[-1]) != workers:
            self.next = 0
        self.phases, self.failures = [*over, positions_read], Failures()
        return over, positions_read

    def advance(self, worker: int, positions_read: int, failures: Failures) -> None:
        """Record how many positions a worker has read, and its new failures. InputError: too many rows failed."""
        self.phases[-1][worker], self.next = positions_read, (worker + 1) % len(self.phases[-1])
        self.failures.merge(failures)
        self.failures.check(self.max_failures)

    def finish(self) -> None:
        """End the pass. InputError: too many of its rows failed, however few rows it had."""
        self.failures.check(self.max_failures, least=1)

    def reset(self) -> None:
        """Let the next pass begin at the start."""
        self.phases, self.next, self._resumed = [], 0, False

    def state(self) -> dict[str, Any]:
        """Return the numbers that `resume` takes, which JSON can hold."""
        return {"phases": [list(phase) for phase in self.phases], "next": self.next}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Let the next pass begin at a state."""
        self.phases, self.next, self._resumed = [list(phase) for phase in state["phases"]], state["next"], True
