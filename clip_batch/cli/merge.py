"""merge, sweep, versions and remove: indices, and what is in them."""

from __future__ import annotations

import json
from dataclasses import asdict

from clip_batch.cli.arguments import Options, answer, say
from clip_batch.errors import ConfigError


def merge(options: Options) -> int:
    """Build sharded indices and metadata in index order, and measure their recall."""
    from clip_batch.index.merge import merge as stage
    from clip_batch.index.merge.job import open_job

    task, slot, slots = options.target.task, options.target.slot, options.target.slots
    if {slot is None, slots is None} != {task != "shards"}:
        raise ConfigError("merge --task shards needs --slot I and --slots N; the other tasks take neither")
    if slot is not None and slots is not None and not 0 <= slot < slots:
        raise ConfigError(f"merge --slot {slot} of --slots {slots} does not exist: slots count from 0 to {slots - 1}")
    job = open_job(options.output, options.index, options.merge, options.storage)
    manifest = stage.finished(job, say)
    if manifest is None and task in ("all", "train"):
        stage.train(job, say)
    if manifest is None and task in ("all", "shards"):
        for shard in range(slot or 0, job.shards, slots or 1):
            stage.build_shard(job, shard, say)
    if manifest is None and task in ("all", "manifest"):
        manifest = stage.publish(job, say)
    if manifest is None:
        summary = {"task": task, "version": job.version, "index_shards": job.shards}
        answer(options, summary, f"{task} done of version {job.version}, which has {job.shards} index shards")
        return 0
    text = f"merged {manifest.rows:,} rows into {len(manifest.shards)} index shards: {options.index}"
    answer(options, json.loads(manifest.to_json()), text)
    return 0


def sweep(options: Options) -> int:
    """Try index keys on a sample of OUT: recall, ms a query, bytes a vector, and which one to take."""
    from clip_batch.index.merge import sweep as stage

    found = stage.sweep(options.output, options.merge, options.storage, options.sweep, say)
    answer(options, asdict(found), stage.describe(found))
    return 0


def versions(options: Options) -> int:
    """The versions of an index, and which one is live; --use makes another one live."""
    from clip_batch.index import versions as stage
    from clip_batch.storage.store import Store

    store = Store(options.index, options.storage.storage_options)
    if options.target.use:
        stage.use(store, options.target.use)
    if options.target.drop:
        stage.drop(store, options.target.drop)
    found = stage.versions(store)
    answer(options, [asdict(one) for one in found], stage.describe(found))
    return 0


def remove(options: Options) -> int:
    """Remove rows from every search, now and in later versions, by a list of keys."""
    from clip_batch.index import versions as stage

    if not options.target.keys:
        raise ConfigError("remove needs --keys FILE: one value of --column a line")
    target = options.target
    report = stage.remove(options.index, target.keys, target.column, options.storage, say)
    text = f"{report.rows:,} rows of the live version removed by {report.values:,} values of {target.column}"
    if report.missing:
        text += f"; {report.missing:,} values have no row in it, such as {', '.join(report.examples)}"
    answer(options, asdict(report), text)
    return 0
