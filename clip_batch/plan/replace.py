"""Replacing the plan of an OUT in which nothing is committed.

A planner holds `replacing.json`, created only if it is absent, from before it removes the old plan until the new one is
written. Before each commit, a worker compares the digest of the partition's generation with that of its own plan
(`check_digest`). A commit that is created between that look and the removal carries the old plan's digest, which verify
and merge refuse.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator

from clip_batch.errors import PlanError
from clip_batch.plan import paths
from clip_batch.plan.state import commit_names, is_alive, worker_records
from clip_batch.plan.stored import read_generations
from clip_batch.storage.store import Store
from clip_batch.types import Plan, counted


def check_digest(store: Store, plan: Plan, partition: int) -> None:
    """PlanError if a partition of the plan of an output is not the one that it was in `plan` any more."""
    digest = plan.generation(partition).digest
    if not plan.generations or partition < plan.generations[0].stop:
        stays = _digest(store) == digest
    else:
        stays = any(one.digest == digest for one in read_generations(store))
    if not stays:
        raise PlanError(f"the plan of {store.url} was replaced while this worker ran: start it again for the new plan")


def obstacle(store: Store) -> str:
    """Why the plan of an output may not be replaced: partitions are committed, or workers are at work; "" if it may."""
    if commits := commit_names(store):
        return f"{counted(len(commits), 'partition')} committed: give another output"
    if names := [one["worker"] for one in worker_records(store) if is_alive(one["ended"], one["beat"])]:
        return f"{names[0]} is at work on it: stop the workers and wait a minute, or give another output"
    return ""


@contextlib.contextmanager
def replaced(store: Store, digest: str) -> Iterator[None]:
    """Remove the plan with this digest, and what belongs to it, while the block writes another one.

    PlanError: the plan may not be replaced, or another planner is replacing it; then nothing is removed.
    """
    us = f"{socket.gethostname()}:{os.getpid()}"
    if not store.create(paths.REPLACING, json.dumps({"planner": us}).encode()):
        raise PlanError(
            f"another planner is replacing the plan of {store.url}, or died at it: if none is at work, delete "
            f"{store.display(paths.REPLACING)} and plan again"
        )
    try:
        files = {name: store.read(name) for name in (paths.CONFIG, paths.SLICES, paths.PLAN) if store.exists(name)}
        added = [f"{paths.EXTENSIONS}/{name}" for name in store.list(paths.EXTENSIONS)]
        files |= {name: store.read(name) for name in sorted(added, key=lambda name: name.endswith(".json"))}
        if (why := obstacle(store)) or read_generations(store)[-1].digest != digest:
            raise PlanError(f"the plan of {store.url} stays: {why or 'another planner has replaced it; plan again'}")
        for name in reversed(files):  # the last extension first, so that a plan is left whenever this ends
            store.remove(name)
        if why := obstacle(store):  # a worker was faster
            for name, data in files.items():
                store.create(name, data)
            raise PlanError(f"the plan of {store.url} stays: {why}")
        for folder in (paths.SUBMISSIONS, paths.WORKERS, paths.ATTEMPTS, paths.LISTINGS, paths.RENEWED):
            store.remove_folder(folder)
        store.remove(paths.LOOK)
        yield
    finally:
        store.remove(paths.REPLACING)


def _digest(store: Store) -> str | None:
    """The digest in plan.json; None where there is no plan."""
    try:
        return str(store.read_json(paths.PLAN)["digest"])
    except FileNotFoundError:
        return None
