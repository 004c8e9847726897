"""Rows that gave no sample, counted by reason, with the first of each reason listed; too many end the stream."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from clip_batch.errors import InputError

LISTED = 20
"""Largest number of listed failures per reason."""

LEAST = 100
"""Rows that must have been read before the share of failures can end the stream."""

log = logging.getLogger("clip_batch.dataset")


class Failed(NamedTuple):
    """A row without a sample: its id and key, one of the reasons in docs/training.md, and a message."""

    id: int
    key: str | None
    reason: str
    message: str


@dataclass
class Failures:
    """How many of the `rows` that were read failed, by reason, and the first LISTED failures of each reason."""

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    listed: list[Failed] = field(default_factory=list)

    def add(self, failed: Failed) -> None:
        """Count a failure, and log it if it is the first of its reason."""
        if not self.counts[failed.reason]:
            log.warning("%s: row %d: %s", failed.reason, failed.id, failed.message)
        if self.counts[failed.reason] < LISTED:
            self.listed.append(failed)
        self.counts[failed.reason] += 1

    def since(self, before: Failures) -> Failures:
        """Return the failures that were added after `before`, a copy of an earlier state."""
        return Failures(self.rows - before.rows, self.counts - before.counts, self.listed[len(before.listed) :])

    def copy(self) -> Failures:
        """Return a copy that later failures do not change."""
        return Failures(self.rows, self.counts.copy(), self.listed[:])

    def merge(self, more: Failures) -> None:
        """Add the failures that another process counted."""
        self.rows += more.rows
        for failed in more.listed:
            if sum(known.reason == failed.reason for known in self.listed) < LISTED:
                self.listed.append(failed)
        self.counts += more.counts

    def check(self, limit: float, least: int = LEAST) -> None:
        """Raise InputError if more than `limit` (0 to 1) of the rows failed and at least `least` rows were read."""
        if (failed := self.counts.total()) > limit * self.rows and self.rows >= least:
            first = self.listed[0]
            raise InputError(
                f"{failed} of {self.rows} rows gave no sample ({self}), more than max_failures of {limit:g}; "
                f"the first, row {first.id}: {first.message}"
            )

    def __str__(self) -> str:
        return ", ".join(f"{reason} {count}" for reason, count in self.counts.most_common())
