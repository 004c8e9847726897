"""merge, sweep and versions: building indices, and their versions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from shlex import quote
from typing import TYPE_CHECKING, Literal

from clip_batch.cli.arguments import IndexArguments, JsonArguments, OutputArguments, answer, say, say_next
from clip_batch.config import MergeConfig, StorageConfig, SweepConfig
from clip_batch.config.values import Count
from clip_batch.errors import ConfigError
from clip_batch.types import counted

if TYPE_CHECKING:
    from clip_batch.index.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class MergeArguments(JsonArguments, IndexArguments):
    """What is merged into which index, and which task of it."""

    output: list[str] = field(default_factory=list, metadata={"path": True})
    """The embeddings folders that are merged: paths or URLs; with --anew by default those of the live version."""
    task: Literal["all", "train", "shards", "manifest"] = "all"
    """Which task of the merge to run; `shards` takes --slot I and --slots N; all: one after another."""
    slot: int | None = None
    """Number of this task among `slots`, from 0; with --task shards."""
    slots: Count | None = None
    """How many tasks share the index shards; with --task shards."""


def merge(arguments: MergeArguments, merge: MergeConfig, storage: StorageConfig) -> int:
    """Build sharded indices and metadata in index order, and measure their recall."""
    from clip_batch.index.merge import merge as stage
    from clip_batch.index.merge.job import open_job

    index, task, slot, slots = arguments.index_folder, arguments.task, arguments.slot, arguments.slots
    if {slot is None, slots is None} != {task != "shards"}:
        raise ConfigError("merge --task shards needs --slot I and --slots N; the other tasks take neither")
    if slot is not None and slots is not None and not 0 <= slot < slots:
        raise ConfigError(f"merge --slot {slot} of --slots {slots} does not exist: slots count from 0 to {slots - 1}")
    if merge.replace and not merge.add and len(arguments.output) < 2:
        say("--replace has no effect here: it is for --add, and for a tar that several --output have")
    if task == "all":
        manifest: Manifest | None = stage.merge(arguments.output, index, merge, storage=storage, progress=say)
    else:
        job = open_job(arguments.output, index, merge, storage)
        manifest = stage.finished(job, say, rebuild=task == "train")
    if manifest is None and task == "train":
        stage.train(job, say)
    if manifest is None and task == "shards":
        for shard in range(slot or 0, job.shards, slots or 1):
            stage.build_shard(job, shard, say)
    if manifest is None and task == "manifest":
        manifest = stage.publish(job, say)
    if manifest is None:
        summary = {"task": task, "version": job.version, "index_shards": job.shards}
        answer(arguments, summary, f"{task} done of version {job.version}, which has {job.shards} index shards")
        return 0
    text = f"merged {counted(manifest.rows, 'row')} into {counted(len(manifest.shards), 'index shard')}: {index}"
    answer(arguments, json.loads(manifest.to_json()), text)
    say_next(f"clip-batch serve --index {quote(index)}")
    return 0


@dataclass(frozen=True, kw_only=True)
class SweepArguments(JsonArguments, OutputArguments):
    """Whose vectors `sweep` tries index keys on, and where it draws the result."""

    plot: str = ""
    """Also draw recall against milliseconds in this SVG file, a path or a URL; missing folders are made, as for OUT."""


def sweep(arguments: SweepArguments, sweep: SweepConfig, merge: MergeConfig, storage: StorageConfig) -> int:
    """Try index keys on a sample of OUT: recall, ms a query, bytes a vector, and which one to take."""
    from clip_batch.index.merge import sweep as stage
    from clip_batch.index.merge.sweep_plot import svg
    from clip_batch.storage.store import write_url

    if arguments.plot and not arguments.plot.endswith(".svg"):
        raise ConfigError(f"--plot {arguments.plot} must end in .svg: the picture is an SVG file")
    report = stage.sweep(arguments.output, merge, storage, sweep, say)
    answer(arguments, asdict(report), stage.describe(report))
    if arguments.plot:
        write_url(arguments.plot, svg(report).encode(), storage.storage_options)
    return 0


@dataclass(frozen=True, kw_only=True)
class VersionsArguments(JsonArguments, IndexArguments):
    """What `versions` changes."""

    use: str = ""
    """Make this version the live one: go back to an older one, or forward again. Removed rows stay removed."""
    drop: str = ""
    """Delete this version, unless it is live or another one needs it; gc --index deletes all that nothing needs."""


def versions(arguments: VersionsArguments, storage: StorageConfig) -> int:
    """List the versions of an index: what they hold, need and cost, when they were live, and how to go back."""
    from clip_batch.index import versions as stage
    from clip_batch.index.manifest import load_manifest
    from clip_batch.storage.store import Store

    store = Store(arguments.index_folder, storage.storage_options)
    if arguments.use:
        stage.use(store, arguments.use)
    if arguments.drop:
        stage.drop(store, arguments.drop)
    listed = stage.versions(store)
    if not listed:
        load_manifest(store)  # refuses a folder that is no index, such as a mistyped one
    answer(arguments, [asdict(version) for version in listed], stage.describe(listed, store.url))
    return 0
