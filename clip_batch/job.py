"""A merge job: what is merged, by which options, into which version, in which index shards.

Each task may be tried several times, at once too. An attempt writes under names of its own; its
record is created only if absent and names it, and readers read only what a record names.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import IO, Any

from clip_batch import vectors
from clip_batch.config import MergeConfig, StorageConfig, parse_bytes
from clip_batch.errors import ConfigError
from clip_batch.plan import load_plan
from clip_batch.store import Store, file_digest

FORMAT = 2
"""Of what the tasks leave for each other; a part of the version's name."""

TEMPLATE = "template"
"""Folder: `record.json`, and `<attempt>/` with the files of the attempt that it names."""

QUERIES = "queries.npz"
CENTROIDS = "centroids.npy"
TRUTH = "truth"

ATTEMPTS = "attempts"
"""Folder: `<shard>-<attempt>/` with an index shard's files until they have their final names."""


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
        return self._record(f"{TEMPLATE}/record.json")

    def template(self, trained: dict[str, Any], name: str) -> str:
        """A file of the attempt that trained, relative to INDEX."""
        return self.path(f"{TEMPLATE}/{trained['attempt']}/{name}")

    def built(self, shard: int) -> dict[str, Any] | None:
        """What `build_shard` recorded; None if it has not ended."""
        return self._record(f"shards/{self.shard_name(shard)}.json")

    def _record(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(self.index.read_json(self.path(name)))
        except FileNotFoundError:
            return None

    def try_train(self) -> Attempt:
        """A new attempt to train."""
        return Attempt(self, f"{TEMPLATE}/record.json", f"{TEMPLATE}/")

    def try_shard(self, shard: int) -> Attempt:
        """A new attempt to build an index shard; its files are named below its folder as `settle` names them."""
        name = self.shard_name(shard)
        return Attempt(self, f"shards/{name}.json", f"{ATTEMPTS}/{name}-")

    def settle(self, shard: int, record: dict[str, Any]) -> None:
        """Give the files of a built shard their final names, as far as they have not got them.

        Whoever finds the record may do this, at once with the attempt that won: that may be dead.
        """
        folder = self.path(f"{ATTEMPTS}/{self.shard_name(shard)}-{record['attempt']}")
        if self.index.list(folder):
            for name in record["files"]:
                self.index.rename(f"{folder}/{name}", self.path(name))
            self.index.remove_folder(folder)

    def clean(self, trained: dict[str, Any]) -> None:
        """Remove what attempts left that did not win; only once every shard is settled."""
        self.index.remove_folder(self.path(ATTEMPTS))
        for name in self.index.list(self.path(TEMPLATE)):
            if name not in ("record.json", trained["attempt"]):
                self.index.remove_folder(self.path(f"{TEMPLATE}/{name}"))


class Attempt:
    """One attempt at a task: files under names of its own, then the record that makes them count.

    A context manager: an error of reading or writing is dropped where another attempt's record
    stands, for the task is done then, and `publish` may have cleaned this attempt away. Nothing is
    deleted on any other error: the record may stand although creating it raised.
    """

    def __init__(self, job: Job, record: str, prefix: str) -> None:
        self.id = secrets.token_hex(4)
        self.files: dict[str, dict[str, Any]] = {}
        self.record: dict[str, Any] = {}
        self._index, self._name = job.index, job.path(record)
        self._folder = job.path(f"{prefix}{self.id}")

    @property
    def won(self) -> bool:
        """Whether the record, once it stands, names this attempt."""
        return self.record.get("attempt") == self.id

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, (OSError, RuntimeError)) and self._index.exists(self._name):
            self._decide()
            return not self.won
        return False

    def write(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        """Write a file of the attempt."""
        with self._index.writer(f"{self._folder}/{name}") as file:
            write(file)
            file.flush()
            with open(file.name, "rb") as written:
                size = written.seek(0, 2)
            self.files[name] = {"bytes": size, "sha256": file_digest(file.name)}

    def commit(self, **fields: Any) -> None:
        """Create the record if there is none; `record` is the one that stands. The loser removes its files."""
        record = {"attempt": self.id, **fields, "files": self.files}
        self._index.create(self._name, json.dumps(record, indent=1).encode())
        self._decide()

    def _decide(self) -> None:
        """Go by the record that stands, not by what `create` said: its answer may have been lost."""
        self.record = self._index.read_json(self._name)
        if not self.won:
            self._index.remove_folder(self._folder)


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
