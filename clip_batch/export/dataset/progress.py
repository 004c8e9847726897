"""How far a pass over a dataset is: the numbers of its `state_dict`, which stream and loader keep up to date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clip_batch.export.dataset import deal
from clip_batch.export.dataset.failures import Failures


@dataclass
class PassProgress:
    """How far the workers of a pass are, and the rows that failed in it; `max_failures` (0 to 1) bounds those.

    `phases` has, for each phase, how many of its positions each worker has gone through (see `deal`); the last phase
    is at work. `next` is the worker whose batch comes next.
    """

    max_failures: float
    phases: list[list[int]] = field(default_factory=list)
    next: int = 0
    failures: Failures = field(default_factory=Failures)
    _resumed: bool = False

    def begin(self, workers: int) -> tuple[list[list[int]], list[int]]:
        """Begin a pass of so many workers, from the loaded state, else from the start.

        Returns the phases that are over and the one at work, whose counts whoever reads keeps up to date.
        """
        phases, self._resumed = self.phases if self._resumed else [], False
        over, gone = deal.begin(phases, workers)
        if not phases or len(phases[-1]) != workers:
            self.next = 0
        self.phases, self.failures = [*over, gone], Failures()
        return over, gone

    def advance(self, worker: int, gone: int, failures: Failures) -> None:
        """Record that a worker has gone through `gone` positions, and what failed meanwhile. InputError: too much."""
        self.phases[-1][worker], self.next = gone, (worker + 1) % len(self.phases[-1])
        self.failures.merge(failures)
        self.failures.check(self.max_failures)

    def finish(self) -> None:
        """End the pass. InputError: too many of its rows failed, however few they were."""
        self.failures.check(self.max_failures, least=1)

    def reset(self) -> None:
        """Let the next pass begin from the start."""
        self.phases, self.next, self._resumed = [], 0, False

    def state(self) -> dict[str, Any]:
        """The numbers from which `resume` goes on, for JSON too."""
        return {"phases": [list(phase) for phase in self.phases], "next": self.next}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Let the next pass go on from a state."""
        self.phases, self.next, self._resumed = [list(phase) for phase in state["phases"]], state["next"], True
