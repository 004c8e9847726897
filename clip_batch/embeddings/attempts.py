"""Failed attempts: why a partition is still not committed. `status` shows them; no decision to commit rests on them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Container
from typing import TypedDict

from clip_batch.plan import paths
from clip_batch.storage.store import Store
from clip_batch.types import Plan


class FailedAttempt(TypedDict):
    """The record of a failed attempt, as its file has it; `time` is in Unix seconds."""

    partition: int
    time: float
    error: str


def record_failure(store: Store, plan: Plan, partition: int, error: str) -> None:
    """Leave a record of an attempt that failed just now; OSError if the store refuses it."""
    attempt = FailedAttempt(partition=partition, time=time.time(), error=error)
    store.create(paths.failed_attempt(plan.name(partition), secrets.token_hex(4)), json.dumps(attempt).encode())


def attempted(store: Store) -> set[int]:
    """The partitions with a failed attempt, whether they are committed now or not."""
    return {attempt[0] for name in store.list(paths.ATTEMPTS) if (attempt := paths.parse_attempt(name))}


def last_errors(store: Store, partitions: Container[int]) -> dict[int, str]:
    """The error of the last failed attempt at each of the partitions that has one."""
    last: dict[int, tuple[float, str]] = {}
    for name in store.list(paths.ATTEMPTS):
        parsed = paths.parse_attempt(name)
        if parsed and parsed[0] in partitions:
            attempt: FailedAttempt = store.read_json(f"{paths.ATTEMPTS}/{name}")
            last[parsed[0]] = max(last.get(parsed[0], (0.0, "")), (attempt["time"], attempt["error"]))
    return {number: error for number, (_, error) in last.items()}
