"""A merge job: what is merged, by which options, into which version, in which index shards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from shlex import join
from typing import Any, NotRequired, TypedDict

from clip_batch.config import MergeConfig, StorageConfig, parse_bytes
from clip_batch.config.options import to_flags
from clip_batch.embeddings import clip_retrieval, reader
from clip_batch.embeddings.outputs import Outputs
from clip_batch.errors import ConfigError, CorruptError, IncompleteError, PlanError
from clip_batch.index import kept
from clip_batch.index.ann import footprint, index_keys
from clip_batch.index.ann.index_keys import Choice
from clip_batch.index.manifest import DuplicateRows, Manifest, MergedOutput, load_manifest
from clip_batch.index.merge.attempt import Attempt
from clip_batch.index.merge.overlap import Overlap, look
from clip_batch.index.paths import VersionPaths, is_own
from clip_batch.index.publications import being_deleted, read_state
from clip_batch.plan import paths
from clip_batch.plan.apart import contains
from clip_batch.plan.plan import load_plan
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec, StoredFile

FORMAT = 6
"""Version of the files that merge tasks exchange; a part of the index version's digest."""

DEDUP = 2
"""Version of what `--dedup` compares; a part of the digest of a merge that has it."""

PERMISSIONS = ("replace", "anew")
"""Options that only allow what a merge without them refuses: no part of the digest."""

MOST_ROWS = 5_000_000
"""Rows of an index shard at most, unless `shard_rows` is larger: a lost task loses little, a server opens few files."""

MOST_SHARDS = 10_000
"""Index shards of one merge at most: a search asks each of them, and a server opens their files."""

TINY_SHARD, MOST_TINY_SHARDS = 1000, 100
"""Rows below which an index shard costs more to build and ask than it holds, and how many such shards may be."""

FEW_ROWS = 1000
"""Rows up to which `--index-key auto` is Flat whatever `flat_rows` is: they train no codebook."""

ROW_BYTES = 160
"""Memory of a shard task for each row, besides vectors and codes: list, position, flags, an id map's entry, growth."""

BASE_BYTES = 700_000_000
"""Memory of a merge task besides its shard and the template: Python with faiss and pyarrow, and blocks in work."""


class TemplateRecord(TypedDict):
    """What `train` recorded: see `clip_batch.index.merge.train.Template`.

    `job` is `MergeJob.identity`, `replaces` the version that was live then, `rows` those of the OUTs, `shards` the
    number of index shards, and `command` runs the merge; older releases recorded none of these.
    """

    attempt: str
    keys: dict[str, str]
    kinds: list[str]
    template: str
    reference: str
    duplicates: DuplicateRows
    rerank: int
    tried: dict[str, list[dict[str, Any]]]
    predictors: dict[str, dict[str, dict[str, StoredFile]]]
    left_out: int
    standing: list[int]
    seconds: float
    files: dict[str, StoredFile]
    job: NotRequired[str]
    replaces: NotRequired[str | None]
    rows: NotRequired[int]
    shards: NotRequired[int]
    command: NotRequired[str]


class ShardRecord(TypedDict):
    """What `build_shard` recorded; `files` are named relative to the version's folder."""

    attempt: str
    rows: int
    seconds: float
    files: dict[str, StoredFile]


@dataclass(frozen=True)
class MergeJob:
    """One merge, the same for each of its tasks: a pure function of OUTs, options and the version that is added to.

    `source` has the rows of all OUTs, without the parts that the index holds already, and `overlap` is what is to be
    compared of them; `outputs` describes the OUTs as they are. `base` is the version that is added to, the live one;
    None for a merge without `add`. `live` is the version that was live when the job was opened (None: nothing).
    """

    source: Outputs
    index: Store
    config: MergeConfig
    base: Manifest | None = None
    live: str | None = None
    outputs: tuple[MergedOutput, ...] = ()
    overlap: Overlap = field(default_factory=Overlap)

    @cached_property
    def version(self) -> str:
        """12 hex digits over the commits, the options and the version that is added to."""
        return _digest([FORMAT, self._commits, self._options, self.base and self.base.version])

    @cached_property
    def identity(self) -> str:
        """12 hex digits over the commits and the options, whichever version is live."""
        return _digest([FORMAT, self._commits, self._options])

    @property
    def _commits(self) -> str | list[str]:
        """The digest over the commits of OUT, or those of several OUTs."""
        digests = [output.digest for output in self.outputs]
        return digests[0] if len(digests) == 1 else digests

    @property
    def places(self) -> list[str]:
        """The flags of merge that name the OUTs and the INDEX."""
        return ["--output", *(output.output for output in self.outputs), "--index", self.index.url]

    @property
    def command(self) -> str:
        """The command that runs the merge, for people."""
        return join(["clip-batch", "merge", *self.places, *to_flags(self.config)])

    @property
    def _options(self) -> dict[str, Any]:
        """The options that say what the version holds."""
        options = {name: value for name, value in asdict(self.config).items() if name not in PERMISSIONS}
        options |= {"dedup": [self.config.dedup, DEDUP]} if self.config.dedup else {}
        return {**options, "replace": True} if self._brings_back else options

    @property
    def _brings_back(self) -> bool:
        """Whether rows that were replaced before may come back: the one case in which `replace` changes a version."""
        return self.config.replace and bool(self.base and self.base.replaced)

    @property
    def encoder(self) -> EncoderSpec:
        """The encoder of all OUTs, with the digest of its weights if any OUT has it."""
        encoders = [source.plan.encoder for source in self.source.sources]
        return next((encoder for encoder in encoders if encoder.weights), encoders[0])

    @property
    def nothing_new(self) -> bool:
        """Whether the version that is added to has all rows, as far as that is known before training."""
        if not self.base:
            return False
        known = {one.digest for one in self.outputs} <= {one.digest for one in self.base.sources}
        if not self.source.rows or (known and not self._brings_back):
            return True
        record = self.template_record()
        return record is not None and record.get("left_out") == self.source.rows

    def choices(self, rows: int, indices: int) -> list[Choice]:
        """The index keys that may serve an index of `rows` rows, the best first; one where it was given by hand.

        `indices` share `index_memory`, as many as there are modalities with vectors. ConfigError: nothing fits in it.
        """
        config, rerank = self.config, None if self.config.rerank == "auto" else self.config.rerank
        memory = parse_bytes(config.index_memory) // indices
        if config.index_key == "autofaiss":
            return [Choice(index_keys.autofaiss_key(rows, self.source.dim, memory), rerank or 0)]
        if config.index_key != "auto":
            return [Choice(config.index_key, rerank or 0)]
        flat_fits = footprint.served_bytes("Flat", rows, self.source.dim) <= memory
        if rows <= FEW_ROWS or (rows <= config.flat_rows and flat_fits):
            return [Choice("Flat", rerank or 0)]
        mapped = config.layout == "single"
        return index_keys.choices(rows, self.source.dim, memory, rerank, config.growing, mapped)

    def is_tried(self, choices: Sequence[Choice]) -> bool:
        """Whether these index keys are tried on the data before one is taken: those of `auto`, other than Flat."""
        return self.config.index_key == "auto" and choices[0].key != "Flat"

    @cached_property
    def _index_keys(self) -> set[str]:
        """The index keys that a task must have memory for; how many modalities have vectors is not known yet."""
        if self.base:
            return set(self.base.key.values())
        most = sum(modality in self.source.kinds for modality in self.config.modalities) or 1
        keys = {choice.key for choice in self.choices(self.source.rows, 1)}
        for count in range(2, most + 1):
            with contextlib.suppress(ConfigError):  # if as many have vectors, training will say so
                keys |= {choice.key for choice in self.choices(self.source.rows, count)}
        return keys

    @cached_property
    def task_bytes(self) -> int:
        """Bytes of memory that a task takes besides those for each row."""
        dim = self.source.dim
        return BASE_BYTES + max(
            footprint.template_bytes(key, dim) + footprint.LIST * lists + footprint.predictor_bytes(lists, dim)
            for key, lists in ((key, index_keys.lists(key)) for key in self._index_keys)
        )

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of memory that a shard task takes for each row."""
        return (
            2 * self.source.dim
            + max(footprint.code_bytes(key, self.source.dim) for key in self._index_keys)
            + ROW_BYTES
        )

    def needs(self, rows: int) -> int:
        """Bytes of memory that a shard task of `rows` rows takes at most; see docs/merge.md."""
        return self.task_bytes + self.row_bytes * rows

    @cached_property
    def shards(self) -> int:
        """The number of index shards: for each OUT as few as `shard_rows` or, without it, `max_memory` allows.

        ConfigError: a shard of `shard_rows` rows does not fit in `max_memory`, or there would be too many.
        """
        room = parse_bytes(self.config.max_memory) - self.task_bytes
        most = max(0, room) // self.row_bytes
        rows = self._shard_rows(most)
        if rows > most:
            needed = self.needs(rows)
            remedy = "lower --shard-rows or raise --max-memory" if self.config.shard_rows else "raise --max-memory"
            raise ConfigError(
                f"an index shard takes {needed:,} bytes of memory, {self.row_bytes:,} a row, "
                f"and --max-memory is {self.config.max_memory}: {remedy}"
            )
        count, limit = sum(self._counts(rows)), MOST_SHARDS if rows >= TINY_SHARD else MOST_TINY_SHARDS
        if count > limit:
            raise ConfigError(
                f"{count:,} index shards of {rows:,} rows are too many to search, {limit:,} of that size are the most: "
                f"raise {'--shard-rows' if self.config.shard_rows else '--max-memory'}"
            )
        return count

    def _shard_rows(self, most: int) -> int:
        """The rows of an index shard at most, if memory has room for `most`."""
        return max(1, min(self.config.shard_rows or min(MOST_ROWS, max(1, most)), self.source.rows))

    def _counts(self, rows: int) -> list[int]:
        """The number of index shards of each OUT, of at most `rows` rows each."""
        return [math.ceil(source.rows / rows) for source in self.source.sources]

    @cached_property
    def _bounds(self) -> list[tuple[int, int, int]]:
        """(rows [start, stop), position of the OUT) of each index shard."""
        most = (parse_bytes(self.config.max_memory) - self.task_bytes) // self.row_bytes
        counts = self._counts(self._shard_rows(most))
        return [
            (first + source.rows * shard // count, first + source.rows * (shard + 1) // count, number)
            for number, (source, first, count) in enumerate(
                zip(self.source.sources, self.source.starts, counts, strict=False)
            )
            for shard in range(count)
        ]

    def bounds(self, shard: int) -> tuple[int, int]:
        """The contiguous rows [start, stop) of one OUT that a shard has; an OUT's shards differ by one row at most."""
        return self._bounds[shard][:2]

    def output(self, shard: int) -> int:
        """The position among all OUTs of the one whose rows a shard has."""
        return self._bounds[shard][2]

    def shard_name(self, shard: int) -> str:
        """The zero-padded number of a shard, counted on from those of the version that is added to."""
        number = shard + (len(self.base.shards) if self.base else 0)
        return f"{number:0{max(4, len(str(self.shards - 1)))}d}"

    @property
    def paths(self) -> VersionPaths:
        """The file names of the version, relative to INDEX."""
        return VersionPaths(self.version)

    def template_record(self) -> TemplateRecord | None:
        """What `train` recorded; None until it has."""
        record: TemplateRecord | None = self._record(self.paths.template_record)
        return record

    def shard_record(self, shard: int) -> ShardRecord | None:
        """What `build_shard` recorded; None until it has."""
        record: ShardRecord | None = self._record(self.paths.shard_record(self.shard_name(shard)))
        return record

    def _record(self, name: str) -> Any:
        try:
            data = self.index.read(name)
        except FileNotFoundError:
            return None
        remedy = f"clip-batch versions --drop {self.version}, and merge again"
        return kept.parse_record(data, f"{self.index.display(name)} is not the record of a merge task: {remedy}")

    def attempt_training(self) -> Attempt:
        """A new attempt to train; its files are named relative to its folder (see `TemplatePaths`)."""
        id = secrets.token_hex(4)
        return Attempt(self.index, id, self.paths.template(id).folder, self.paths.template_record)

    def attempt_shard(self, shard: int) -> Attempt:
        """A new attempt to build a shard; its files are named in its folder as `settle` names them in the version's."""
        id, name = secrets.token_hex(4), self.shard_name(shard)
        return Attempt(self.index, id, self.paths.attempt(name, id), self.paths.shard_record(name))

    def settle(self, shard: int, record: ShardRecord) -> None:
        """Give the files of a built shard their final names, those that have not got them yet.

        Any task may do this, also at once with the attempt that won, which may have died.
        """
        folder = self.paths.attempt(self.shard_name(shard), record["attempt"])
        if self.index.list(folder):
            for name in record["files"]:
                self.index.rename(f"{folder}/{name}", self.paths.file(name))
            self.index.remove_folder(folder)

    def remove_attempts(self, trained: str) -> None:
        """Remove the files of the attempts that did not win; call it once every shard is settled.

        `trained` is the attempt to train that won.
        """
        self.index.remove_folder(self.paths.attempts)
        for name in self.index.list(self.paths.templates):
            folder = self.paths.template(name).folder
            if name != trained and folder != self.paths.template_record:
                self.index.remove_folder(folder)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def digest(source: reader.Embeddings) -> str:
    """12 hex digits over the commits of OUT and the partitions that it lacks."""
    commits = [
        [commit.partition, commit.attempt, sorted(str(file["sha256"]) for file in commit.files.values())]
        for commit in source.commits
    ]
    return _digest([commits, source.missing])


def open_source(out: Store, made_by: EncoderSpec, allow_partial: bool = False) -> reader.Embeddings:
    """Open OUT, or a folder that clip-retrieval wrote with the encoder `made_by`. Errors: as `open_embeddings`."""
    if clip_retrieval.is_folder(out):
        return clip_retrieval.open_folder(out, made_by)
    return reader.open_embeddings(out, load_plan(out), allow_partial)


def open_job(
    output: str | Sequence[str], index_url: str, config: MergeConfig, storage: StorageConfig = StorageConfig()
) -> MergeJob:
    """The merge job, once its options, its OUTs and the version that is added to are checked. Errors: see `merge`."""
    home, urls = Store(index_url, storage.storage_options), [output] if isinstance(output, str) else list(output)
    if config.add and config.anew:
        raise ConfigError("--add and --anew exclude each other: add to the live version, or merge without it")
    if not urls and not config.anew:
        raise ConfigError("--output OUT is needed: the embeddings folders to merge, unless --anew takes the live ones")
    for url in urls:
        _check_apart(Store(url, storage.storage_options).url, home.url)
    home.check_folder()
    state = read_state(home)
    live = load_manifest(home, state.version) if (config.add and state.version) or not urls else None
    if urls:
        made_by = EncoderSpec(config.made_by[0], "".join(config.made_by[1:]), weights="")
        sources = [open_source(Store(url, storage.storage_options), made_by, config.allow_partial) for url in urls]
    else:
        assert live is not None
        sources = _sources_of(live, config, storage)
    base = live if config.add else None
    _check_alike(sources, base)
    allowed = config.replace or not urls  # what replaces what in the live version was allowed before
    source, overlap = look(sources, home, base, allowed, None if urls else live)
    outputs = tuple(
        MergedOutput(each.store.url, each.plan.digest, digest(each), each.rows, each.missing, each.verified)
        for each in sources
    )
    job = MergeJob(source, home, config, base, state.version, outputs, overlap)
    if job.version in state.dropping and job.version != state.version:  # the live one is built anew by its merge
        raise being_deleted(home, job.version)
    if source.rows:
        _ = job.shards  # raises now if the shards do not fit in memory, or faiss does not know the key
    return job


def _check_apart(output: str, index: str) -> None:
    """ConfigError: OUT is INDEX, or one of them lies among the files of the other."""
    same = contains(index, output) and contains(output, index)
    in_output = any(contains(f"{output}/{name}", index) for name in (paths.HOME, *paths.DATA_FOLDERS))
    in_index = output.startswith(f"{index}/") and is_own(output.removeprefix(f"{index}/").partition("/")[0])
    if same or in_output or in_index:
        raise ConfigError(f"--index {index} and --output {output} share a folder: give an INDEX apart from OUT's files")


def _sources_of(live: Manifest, config: MergeConfig, storage: StorageConfig) -> list[reader.Embeddings]:
    """The OUTs of a version, each once, as they are now. ConfigError names those that cannot be opened."""
    sources, gone = [], []
    for url in dict.fromkeys(source.output for source in live.sources):
        try:
            store = Store(url, storage.storage_options)
            sources.append(open_source(store, live.encoder, config.allow_partial))
        except IncompleteError:
            raise
        except (PlanError, CorruptError) as error:
            gone.append(f"{url} ({error})")
    if gone or not sources:
        what = f"sources of version {live.version} cannot be read: {'; '.join(gone) or 'it records none'}"
        raise ConfigError(f"{what}: put them back, or name what is left with --output")
    return sources


def _check_alike(sources: Sequence[reader.Embeddings], base: Manifest | None) -> None:
    """ConfigError where an OUT has another encoder or dimension than the index, or than the OUT before it."""
    first = sources[0]
    encoder, dim = (base.encoder, base.dim) if base else (first.plan.encoder, first.dim)
    of = f"index version {base.version}" if base else first.store.url
    for source in sources:
        ours = source.plan.encoder
        for what, of_out, theirs, fits in (
            ("encoder", _named(ours), _named(encoder), ours.agrees(encoder)),
            ("dimension", source.dim, dim, source.dim == dim),
        ):
            if not fits:
                raise ConfigError(
                    f"{source.store.url} has {what} {of_out}, {of} has {theirs}: merge it into an INDEX of its own"
                )


def _named(encoder: EncoderSpec) -> str:
    return f"{encoder.model} {encoder.pretrained} ({encoder.fingerprint})"
