"""What stands in an OUT beside its plan: which partitions are committed, and which workers are at work.

`embeddings` writes and reads it whole; a planner needs no more than this, to know whether the plan may be replaced.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from clip_batch.plan import paths
from clip_batch.storage.names import name_text
from clip_batch.storage.store import Store
from clip_batch.types import Shard

SILENT = 60.0
"""Seconds without a write of its record after which a worker is taken for dead."""


def commit_names(store: Store) -> list[str]:
    """The zero-padded numbers of the committed partitions, by one listing; files with other names are ignored."""
    return [name[:-5] for name in store.list(paths.COMMITS) if name.endswith(".json") and name[:-5].isdigit()]


def newer_inputs(store: Store) -> dict[int, dict[str, Any]]:
    """By partition, the `inputs` of those commits that replaced another one (see `types.Commit`); most have none."""
    names = {name.partition("-")[0] for name in store.list(paths.RENEWED) if paths.parse_attempt(name)}
    newer: dict[int, dict[str, Any]] = {}
    for name in sorted(names):
        with contextlib.suppress(FileNotFoundError):
            newer[int(name)] = store.read_json(paths.commit(name)).get("inputs", {})
    return newer


def newest(shard: Shard, inputs: Mapping[str, Any]) -> Shard:
    """A planned shard with the size and version that a commit's `inputs` say it was last embedded with."""
    size, etag = inputs.get(name_text(shard.url), (shard.size, shard.etag))
    return shard if (size, etag) == (shard.size, shard.etag) else replace(shard, size=size, etag=etag)


def worker_records(store: Store) -> list[dict[str, Any]]:
    """The records of all workers, as `embeddings.workers` writes them, those that have ended too."""
    names = [f"{paths.WORKERS}/{name}" for name in store.list(paths.WORKERS) if not name.startswith(".")]
    return [json.loads(data) for data in store.read_all(names)]


def is_alive(ended: bool, beat: float) -> bool:
    """Whether a worker has not ended and last wrote its record (`beat`, Unix seconds) in the last `SILENT` seconds."""
    return not ended and time.time() - beat < SILENT
