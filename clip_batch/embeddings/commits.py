"""Commits: which partitions are committed, and what each commit says.

`commits/<partition>.json` is created only if it is absent (see `part_writer`), and is all that readers trust.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from clip_batch.plan import paths
from clip_batch.plan.state import commit_names
from clip_batch.storage.store import Store
from clip_batch.types import Commit


def committed(store: Store) -> set[int]:
    """The committed partitions, by one listing."""
    return {int(name) for name in commit_names(store)}


def read_commit(store: Store, name: str) -> Commit:
    """The commit of a partition, given its zero-padded number; FileNotFoundError if it is not committed."""
    return Commit(**store.read_json(paths.commit(name)))


def read_commits(store: Store, names: Iterable[str] | None = None) -> dict[int, Commit]:
    """The commits of these zero-padded numbers (None: all), by partition."""
    names = commit_names(store) if names is None else names
    commits = (Commit(**json.loads(data)) for data in store.read_all(paths.commit(name) for name in names))
    return {commit.partition: commit for commit in commits}
