"""A merge job: what is merged, by which options, into which version, in which index shards."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import IO, Any

from clip_batch import vectors
from clip_batch.config import MergeConfig, StorageConfig, parse_bytes
from clip_batch.errors import ConfigError
from clip_batch.plan import load_plan
from clip_batch.store import Store, file_digest

FORMAT = 1
"""Of what the tasks leave for each other; a part of the version's name."""

TRAINED = "template/record.json"
QUERIES = "template/queries.npz"
CENTROIDS = "template/centroids.npy"


@dataclass(frozen=True)
class Job:
    """One merge, as every task sees it: a pure function of OUT and the options."""

    source: vectors.Embeddings
    index: Store
    config: MergeConfig

    @cached_property
    def version(self) -> str:
        """12 hex digits over the commits and the options."""
        commits = [
            [commit.partition, commit.attempt, sorted(str(file["sha256"]) for file in commit.files.values())]
            for commit in self.source.commits
        ]
        text = json.dumps([FORMAT, commits, self.source.missing, asdict(self.config)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of vectors that every part has."""
        commits = self.source.commits
        return tuple(kind for kind, folder in vectors.FOLDER.items() if all(commit.file(folder) for commit in commits))

    @property
    def shards(self) -> int:
        """How many index shards: as few as `shard_rows` allows."""
        return math.ceil(self.source.rows / self.config.shard_rows)

    def bounds(self, shard: int) -> tuple[int, int]:
        """The contiguous rows [start, stop) of a shard; sizes differ by one at the most."""
        return self.source.rows * shard // self.shards, self.source.rows * (shard + 1) // self.shards

    def shard_name(self, shard: int) -> str:
        return f"{shard:0{max(4, len(str(self.shards - 1)))}d}"

    def path(self, name: str) -> str:
        """A name in the version folder, relative to INDEX."""
        return f"{self.version}/{name}"

    def trained(self) -> dict[str, Any] | None:
        """What `train` recorded; None if it has not ended."""
        name = self.path(TRAINED)
        return dict(self.index.read_json(name)) if self.index.exists(name) else None

    def write(self, name: str, write: Callable[[IO[bytes]], object]) -> dict[str, Any]:
        """Publish a file of the version; its {"bytes", "sha256"}."""
        with self.index.writer(self.path(name)) as file:
            write(file)
            file.flush()
            with open(file.name, "rb") as written:
                size = written.seek(0, 2)
            return {"bytes": size, "sha256": file_digest(file.name)}


def open_job(output: str, index_url: str, config: MergeConfig, storage: StorageConfig = StorageConfig()) -> Job:
    """Check the options and OUT, and give the job. Errors: see `merge`."""
    _check(config)
    out = Store(output, storage.storage_options)
    source = vectors.open_embeddings(out, load_plan(out), config.allow_partial)
    return Job(source, Store(index_url, storage.storage_options), config)


def _check(config: MergeConfig) -> None:
    parse_bytes(config.max_memory)
    wrong = [
        f"{name} is {getattr(config, name)!r}, not {wanted}"
        for name, good, wanted in (
            ("modalities", config.modalities and set(config.modalities) <= {"image", "text"}, "image, text or both"),
            ("shard_rows", config.shard_rows >= 1, "1 or more"),
            ("queries", config.queries >= 1, "1 or more"),
            ("train_rows", config.train_rows >= 0, "0 or more"),
            ("recall_target", 0 <= config.recall_target <= 1, "between 0 and 1"),
        )
        if not good
    ]
    if wrong:
        raise ConfigError(f"merge: {'; '.join(wrong)}")
