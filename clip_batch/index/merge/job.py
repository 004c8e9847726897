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

from clip_batch.config import MergeConfig, StorageConfig, parse_bytes
from clip_batch.embeddings import clip_retrieval, reader
from clip_batch.errors import ConfigError
from clip_batch.index.ann import faiss_index, footprint
from clip_batch.index.manifest import Manifest, current_version, load_manifest
from clip_batch.plan import paths
from clip_batch.plan.plan import load_plan
from clip_batch.storage.store import Store, file_digest
from clip_batch.types import EncoderSpec

FORMAT = 3
"""Of what the tasks leave for each other; a part of the version's name."""

TEMPLATE = "template"
"""Folder: `record.json`, and `<attempt>/` with the files of the attempt that it names."""

QUERIES = "queries.npz"
CENTROIDS = "centroids.npy"
TRUTH = "truth"

DROPPED = "dropped.npy"
DUPLICATES = "duplicates.parquet"
"""Rows of OUT that are left out, as numbers for the shards' tasks, and as a report for people."""

MOST_ROWS = 5_000_000
"""Of an index shard, unless `shard_rows` says more: a lost task loses little, and a server opens few files."""

ROW_BYTES = 112
"""A row's share of what a shard task holds besides vectors and codes: list, place, flags, an id map's entry."""

BASE_BYTES = 700_000_000
"""What a merge task holds besides its shard and the template: Python with faiss and pyarrow, and the blocks in work."""

LIST_BYTES = 160
"""Memory of an inverted list, empty or not, besides what it takes in a file."""

ATTEMPTS = "attempts"
"""Folder: `<shard>-<attempt>/` with an index shard's files until they have their final names."""


@dataclass(frozen=True)
class MergeJob:
    """One merge, as every task sees it: a pure function of OUT, the options and, to add to it, the live version."""

    source: reader.Embeddings
    index: Store
    config: MergeConfig
    base: Manifest | None = None

    @cached_property
    def digest(self) -> str:
        """12 hex digits over the commits."""
        return digest(self.source)

    @cached_property
    def version(self) -> str:
        """12 hex digits over the commits, the options and the version that is added to."""
        return _digest([FORMAT, self.digest, asdict(self.config), self.base and self.base.version])

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of vectors that every part has."""
        commits = self.source.commits
        return tuple(kind for kind, folder in paths.VECTORS.items() if all(commit.file(folder) for commit in commits))

    @property
    def rerank(self) -> int:
        """How many times k candidates are scored exactly."""
        return self.base.rerank if self.base else self.config.rerank

    def key(self, rows: int) -> str:
        """The factory string for an index of so many rows."""
        if self.config.index_key != "auto":
            return self.config.index_key
        wanted = [modality for modality in self.config.modalities if modality in self.kinds]
        memory = parse_bytes(self.config.index_memory) // max(1, len(wanted))
        return faiss_index.choose_key(rows, self.source.dim, memory, self.config.flat_rows)

    @cached_property
    def _keys(self) -> set[str]:
        return set(self.base.key.values()) if self.base else {self.key(self.source.rows)}

    @cached_property
    def task_bytes(self) -> int:
        """Bytes of memory that a task takes whatever its rows."""
        dim = self.source.dim
        return BASE_BYTES + max(
            footprint.template_bytes(key, dim) + LIST_BYTES * faiss_index.lists(key) for key in self._keys
        )

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of memory that a shard task takes for each row."""
        return 2 * self.source.dim + max(footprint.code_bytes(key, self.source.dim) for key in self._keys) + ROW_BYTES

    def needs(self, rows: int) -> int:
        """Bytes of memory that a shard task of so many rows takes at the most; see docs/merge.md."""
        return self.task_bytes + self.row_bytes * rows

    @cached_property
    def shards(self) -> int:
        """How many index shards: as few as `shard_rows`, or else `max_memory`, allows. ConfigError: not both can be."""
        room = parse_bytes(self.config.max_memory) - self.task_bytes
        most = max(0, room) // self.row_bytes
        rows = min(self.config.shard_rows or min(MOST_ROWS, max(1, most)), self.source.rows)
        if rows > most:
            needed = self.needs(rows)
            mend = "lower --shard-rows or raise --max-memory" if self.config.shard_rows else "raise --max-memory"
            raise ConfigError(
                f"an index shard takes {needed:,} bytes of memory, {self.row_bytes:,} a row, "
                f"and --max-memory is {self.config.max_memory}: {mend}"
            )
        return math.ceil(self.source.rows / rows)

    def bounds(self, shard: int) -> tuple[int, int]:
        """The contiguous rows [start, stop) of OUT that a shard has; sizes differ by one at the most."""
        return self.source.rows * shard // self.shards, self.source.rows * (shard + 1) // self.shards

    def shard_name(self, shard: int) -> str:
        number = shard + (len(self.base.shards) if self.base else 0)
        return f"{number:0{max(4, len(str(self.shards - 1)))}d}"

    def path(self, name: str) -> str:
        """A name in the version folder, relative to INDEX."""
        return f"{self.version}/{name}"

    def trained(self) -> dict[str, Any] | None:
        """What `train` recorded; None if it has not ended."""
        return self._record(f"{TEMPLATE}/record.json")

    def drawn(self, trained: dict[str, Any], name: str) -> str:
        """A file of the attempt that trained, relative to INDEX."""
        return self.path(f"{TEMPLATE}/{trained['attempt']}/{name}")

    def template(self, trained: dict[str, Any], name: str) -> str:
        """A file of the template, relative to INDEX: that of the base, if this OUT is added to one."""
        return f"{trained['template']}/{name}"

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

    def __init__(self, job: MergeJob, record: str, prefix: str) -> None:
        self.id = secrets.token_hex(4)
        self.folder = job.path(f"{prefix}{self.id}")
        self.files: dict[str, dict[str, Any]] = {}
        self.record: dict[str, Any] = {}
        self._index, self._name = job.index, job.path(record)

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
        with self._index.writer(f"{self.folder}/{name}") as file:
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
            self._index.remove_folder(self.folder)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def digest(source: reader.Embeddings) -> str:
    """12 hex digits over the commits of OUT, and what it lacks."""
    commits = [
        [commit.partition, commit.attempt, sorted(str(file["sha256"]) for file in commit.files.values())]
        for commit in source.commits
    ]
    return _digest([commits, source.missing])


def open_source(out: Store, made_by: EncoderSpec, allow_partial: bool = False) -> reader.Embeddings:
    """OUT, or a folder that clip-retrieval wrote with the encoder `made_by`. Errors: as `open_embeddings`."""
    if clip_retrieval.is_folder(out):
        return clip_retrieval.open_folder(out, made_by)
    return reader.open_embeddings(out, load_plan(out), allow_partial)


def open_job(output: str, index_url: str, config: MergeConfig, storage: StorageConfig = StorageConfig()) -> MergeJob:
    """Check the options, OUT and, to add to it, the live version, and give the job. Errors: see `merge`."""
    _check(config)
    out, home = Store(output, storage.storage_options), Store(index_url, storage.storage_options)
    made_by = EncoderSpec(config.made_by[0], "".join(config.made_by[1:]), weights="")
    source = open_source(out, made_by, config.allow_partial)
    base = load_manifest(home) if config.add and current_version(home) else None
    if base:
        _check_base(source, base)
    job = MergeJob(source, home, config, base)
    _ = job.shards  # refuses now what would not fit, or what faiss does not know
    return job


def _check_base(source: reader.Embeddings, base: Manifest) -> None:
    ours, theirs = source.plan.encoder, base.encoder
    for what, found, wanted, fits in (
        ("encoder", _named(ours), _named(theirs), ours.agrees(theirs)),
        ("dimension", source.dim, base.dim, source.dim == base.dim),
    ):
        if not fits:
            raise ConfigError(
                f"{source.store.url} has {what} {found}, index version {base.version} has {wanted}: merge it into an "
                "INDEX of its own"
            )


def _named(encoder: EncoderSpec) -> str:
    return f"{encoder.model} {encoder.pretrained} ({encoder.fingerprint})"


def _check(config: MergeConfig) -> None:
    parse_bytes(config.max_memory), parse_bytes(config.index_memory)
    wrong = [
        f"{name} is {getattr(config, name)!r}, not {wanted}"
        for name, good, wanted in (
            ("modalities", config.modalities and set(config.modalities) <= {"image", "text"}, "image, text or both"),
            ("shard_rows", config.shard_rows >= 0, "0 or more"),
            ("made_by", len(config.made_by) in (1, 2), "MODEL or MODEL PRETRAINED"),
            ("queries", config.queries >= 1, "1 or more"),
            ("train_rows", config.train_rows >= 0, "0 or more"),
            ("rerank", config.rerank >= 0, "0 or more"),
            ("dedup", 0 <= config.dedup <= 1, "between 0 and 1"),
            ("recall_target", 0 <= config.recall_target <= 1, "between 0 and 1"),
        )
        if not good
    ]
    if wrong:
        raise ConfigError(f"merge: {'; '.join(wrong)}")
