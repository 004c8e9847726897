"""Merge: from committed parts to a version of the index, complete or not there at all.

    train (one task) -> build_shard 0, 1, ... (any order, any process) -> publish (one task)

Each task finds what it needs in storage and creates its record last, so each resumes by itself, and
of attempts at one task, at once or not, the first to record wins. The version's name is a digest of
the commits and the options: a killed merge goes on where it was, a changed OUT makes a new version,
and CURRENT moves only when that one's manifest stands.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_batch.config import MergeConfig, StorageConfig
from clip_batch.embeddings import reader
from clip_batch.errors import ConfigError, IncompleteError
from clip_batch.index import metadata, removals
from clip_batch.index.ann import faiss_index, ondisk
from clip_batch.index.ann.rows import Ordered
from clip_batch.index.manifest import (
    MANIFEST,
    IndexShard,
    Manifest,
    MergedOutput,
    load_manifest,
    make_current,
    publish_manifest,
)
from clip_batch.index.merge import tune
from clip_batch.index.merge.job import ATTEMPTS, DUPLICATES, TRUTH, Attempt, MergeJob, open_job
from clip_batch.index.merge.train import assigner, left_out, make_template, order_modality, read_queries, read_template
from clip_batch.storage import npy
from clip_batch.storage.store import file_digest
from clip_batch.types import StrPath, format_numbers

Say = Callable[[str], None]
Ids = npt.NDArray[np.int64]
Half = npt.NDArray[np.float16]


def merge(
    output: StrPath,
    index: StrPath,
    config: MergeConfig = MergeConfig(),
    *,
    storage: StorageConfig = StorageConfig(),
    progress: Say | None = None,
) -> Manifest:
    """Build a version of INDEX from OUT, or find it finished; all tasks in this process, one after another.

    Every row is checked before anything is built. IncompleteError: partitions are not committed (and
    not `allow_partial`). CorruptError: a committed file is not what its commit says, or a vector is
    not finite and of unit norm. ConfigError: an option is wrong, or faiss refuses the key. PlanError:
    OUT has no plan.
    """
    say = progress or (lambda line: None)
    job = open_job(os.fspath(output), os.fspath(index), config, storage)
    if manifest := finished(job, say):
        return manifest
    train(job, say, every_row=True)
    for shard in range(job.shards):
        build_shard(job, shard, say)
    return publish(job, say)


def finished(job: MergeJob, progress: Say = lambda line: None) -> Manifest | None:
    """The manifest of a version that stands, which is CURRENT then and free of leavings; None while it is made."""
    if job.base and any(source.digest == job.digest for source in job.base.sources):
        progress(f"version {job.base.version} has it already")
        return job.base
    if not job.index.exists(job.path(MANIFEST)):
        return None
    make_current(job.index, job.version)
    manifest = load_manifest(job.index, job.version)
    _tidy(job, manifest)
    progress(f"version {job.version} stands already")
    return manifest


def train(job: MergeJob, progress: Say = lambda line: None, every_row: bool = False) -> None:
    """Check every part, hold queries out, train a template for each modality. Does nothing if it has ended.

    Headers, sizes and counts are always checked; every row here with `every_row`, else by the shards' tasks.
    """
    if job.source.missing:
        progress(f"merging without partitions {format_numbers(job.source.missing)}")
    if job.trained():
        progress(f"version {job.version} is trained already")
        return
    captioned = job.source.check_files(job.kinds)
    if every_row:
        job.source.check_all_rows(job.kinds)
    with job.try_train() as attempt:
        make_template(job, captioned, attempt, progress)
    if not attempt.won:
        progress("another attempt has trained first: its template is taken")


def build_shard(job: MergeJob, shard: int, progress: Say = lambda line: None) -> None:
    """One index shard: assign, sort, add; metadata in the same order; its part of the recall trial.

    If its record stands, only gives the files their final names where that is left to do. Memory: the
    shard's float16 vectors of one kind and one index (`Job.row_bytes` a row). ConfigError: not trained yet.
    """
    at = f"index shard {shard + 1} of {job.shards}"
    if record := job.built(shard):
        progress(f"{at} stands already")
        return job.settle(shard, record)
    if not (trained := job.trained()):
        raise ConfigError(f"{job.index.url}/{job.version} is not trained yet: run clip-batch merge --task train")
    with job.try_shard(shard) as attempt:
        _build(job, trained, shard, attempt)
    by = "" if attempt.won else ", by another attempt"
    progress(f"{at}: {attempt.record['rows']:,} rows in {attempt.record['seconds']:.1f} s{by}")
    job.settle(shard, attempt.record)


def _build(job: MergeJob, trained: dict[str, Any], shard: int, attempt: Attempt) -> None:
    started, name, (start, stop) = time.monotonic(), job.shard_name(shard), job.bounds(shard)
    empty = job.source.read_captionless(start, stop)
    queries, trials = read_queries(job, trained), {}
    order: Ids | None = None
    for modality in sorted(trained["keys"], key=lambda name: name != order_modality(trained["keys"])):
        data = job.source.read_vectors(modality, start, stop)
        job.source.check_rows(modality, start, data, empty if modality == "text" else None)
        lists = None
        if order is None:
            order, lists = _order(job, trained, shard, data)
        rows = Ordered(data, order)
        made = _fill(read_template(job, trained, modality), rows, lists)
        attempt.write(f"{modality}/{name}.index", lambda file, made=made: faiss_index.write(made, file.name))  # type: ignore[misc]
        if job.rerank:
            attempt.write(f"{modality}/{name}.npy", lambda file, rows=rows: rows.save(file))  # type: ignore[misc]
        asked = {
            kind: (npy.unit(vector), _places(own - start, order, stop - start, kind == modality))
            for kind, (own, vector) in queries.items()
        }
        first = job.base.effort[modality] if job.base else None
        shards = job.shards + (len(job.base.shards) if job.base else 0)
        for kind, found in tune.run(made, rows, asked, job.rerank, job.config.recall_target, first, shards).items():
            trials.update({f"{modality}.{kind}.{field}": array for field, array in vars(found).items()})
        del data, rows, made  # before the next one is read
    assert order is not None
    attempt.write(
        f"metadata/{name}.arrow",
        lambda file: metadata.write_ordered(job.source.read_metadata(start, stop), order, file.name),
    )
    attempt.write(f"{TRUTH}/{name}.npz", lambda file: np.savez(file, **trials))
    attempt.commit(rows=len(order), seconds=time.monotonic() - started)


def publish(job: MergeJob, progress: Say = lambda line: None) -> Manifest:
    """Fold the shards' trials, choose the effort, write the manifest, let the version serve.

    First it gives files their final names where an attempt died before it had; last it removes what
    other attempts left. May run twice at once: the first manifest stands. IncompleteError: a shard is not built.
    """
    if manifest := finished(job, progress):
        return manifest
    trained = job.trained()
    records = {shard: record for shard in range(job.shards) if trained and (record := job.built(shard))}
    if not trained or len(records) < job.shards:
        missing = format_numbers(set(range(job.shards)) - set(records))
        raise IncompleteError(f"{job.index.url}/{job.version}: index shards {missing} are not built: merge again")
    for shard, record in records.items():
        job.settle(shard, record)
    effort, measured, drift = tune.tune(job, trained, progress)
    shards = _shards(job, records)
    single = dict(job.base.single) if job.base else {}
    if job.config.layout == "single" and not job.base:
        single = {modality: _join(job, trained, modality, shards) for modality in trained["keys"]}
        shards = [replace(shard, files=_without(shard.files, single)) for shard in shards]
    old = job.base
    duplicates = {**trained["duplicates"], "file": job.drawn(trained, DUPLICATES)} if trained["duplicates"] else {}
    made = Manifest(
        version=job.version,
        created=time.time(),
        dim=job.source.dim,
        rows=sum(shard.rows for shard in shards),
        encoder=old.encoder if old and old.encoder.weights else job.source.plan.encoder,
        plan=old.plan if old else job.source.plan.digest,
        key=trained["keys"],
        effort=effort,
        recall=measured,
        recall_target=job.config.recall_target,
        missing=old.missing if old else job.source.missing,
        allow_partial=job.config.allow_partial or bool(old and old.allow_partial),
        shards=tuple(shards),
        sources=(*(old.sources if old else ()), _source(job)),
        rerank=job.rerank,
        single=single,
        base=old.version if old else "",
        template=old.template if old else job.version,
        drift=drift,
        duplicates=duplicates,
    )
    _check_tombstones(job, made)
    standing = publish_manifest(job.index, made)
    _tidy(job, standing)
    return standing


def _tidy(job: MergeJob, manifest: Manifest) -> None:
    """Remove what other attempts left, and the indices of shards that were joined; who published may have died."""
    if trained := job.trained():
        job.clean(trained)
    for shard in range(job.shards) if not manifest.base else ():
        for modality in manifest.single:
            job.index.remove(job.path(f"{modality}/{job.shard_name(shard)}.index"))


def _check_tombstones(job: MergeJob, made: Manifest) -> None:
    """ConfigError where what was removed by a column could not be found in the new version: nobody could open it."""
    if digests := removals.names(job.index):
        last = made.shards[-1]
        schema = removals.read_schema(job.index, job.path(f"metadata/{last.name}.arrow"))
        for digest in digests:
            removals.check(removals.load(job.index, digest), schema)


def _source(job: MergeJob) -> MergedOutput:
    plan = job.source.plan.digest
    return MergedOutput(
        job.source.store.url, plan, job.digest, job.source.rows, job.source.missing, job.source.verified
    )


def _shards(job: MergeJob, records: dict[int, dict[str, Any]]) -> list[IndexShard]:
    """The shards of the base, and those built now behind them; one whose rows were all left out is none."""
    shards, source = [], 0
    if job.base:
        shards = [replace(shard, version=shard.version or job.base.version) for shard in job.base.shards]
        source = len(job.base.sources)
    offset = sum(shard.rows for shard in shards)
    for number, record in records.items():
        if record["rows"]:
            files = _without(record["files"], (TRUTH,))
            shards.append(IndexShard(job.shard_name(number), record["rows"], offset, files, source=source))
            offset += record["rows"]
    return shards


def _without(files: dict[str, Any], folders: Iterable[str]) -> dict[str, Any]:
    """Files of a shard less those of some folders; vectors (.npy) stay."""
    gone = tuple(f"{folder}/" for folder in folders)
    return {name: file for name, file in files.items() if not name.startswith(gone) or name.endswith(".npy")}


def _join(job: MergeJob, trained: dict[str, Any], modality: str, shards: list[IndexShard]) -> dict[str, Any]:
    """One index of a modality, searched from disk, in the place of its shards': its files, below INDEX."""
    files = {}
    with ExitStack() as stack:
        if job.index.local:
            folder = job.index.path(job.path(f"{ATTEMPTS}/join-{secrets.token_hex(4)}"))
            os.makedirs(folder)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="clip-batch-"))
        template = stack.enter_context(job.index.fetch(job.template(trained, f"{modality}.index")))
        parts = [
            (stack.enter_context(job.index.fetch(job.path(f"{modality}/{shard.name}.index"))), shard.offset)
            for shard in shards
        ]
        ondisk.join(template, parts, os.path.join(folder, "all.index"))
        for name in os.listdir(folder):
            path, final = os.path.join(folder, name), job.path(f"{modality}/{name}")
            files[final] = {"bytes": os.path.getsize(path), "sha256": file_digest(path)}
            job.index.adopt(path, final)
    return files


def _order(job: MergeJob, trained: dict[str, Any], shard: int, data: Half) -> tuple[Ids, Ids]:
    """The shard's rows (n,) sorted by list, stable, and their lists; without those left out as duplicates."""
    assign = assigner(job, trained)
    found = np.concatenate([assign(npy.unit(data[block])) for block in reader.blocks(len(data))])
    order: Ids = np.argsort(found, kind="stable")
    gone = left_out(job, trained, *job.bounds(shard))
    order = order[~np.isin(order, gone)] if len(gone) else order
    return order, found[order]


def _fill(template: Any, rows: Ordered, lists: Ids | None) -> Any:
    """The template filled with rows (n, d), ids 0 to n - 1; zero rows (no caption) are left out.

    `lists` (n,) are those of the rows, if they are known.
    """
    known = lists if faiss_index.has_lists(template) else None
    filled = [npy.filled(rows[block]) for block in reader.blocks(len(rows))]
    made = template if all(block.all() for block in filled) else faiss_index.with_ids(template)
    for block, there in zip(reader.blocks(len(rows)), filled, strict=True):
        theirs = None if known is None else known[block][there]
        faiss_index.add(made, npy.unit(rows[block][there]), block.start + np.flatnonzero(there), theirs)
    return made


def _places(rows: Ids, order: Ids, count: int, here: bool) -> Ids:
    """Where rows of the shard of so many rows, numbered before sorting, are after it; -1: elsewhere, or left out.

    All elsewhere unless `here`: captions' rows are no rows of images.
    """
    after = np.full(count, -1)
    after[order] = np.arange(len(order))
    inside = (rows >= 0) & (rows < count) & here
    return np.where(inside, after[np.where(inside, rows, 0)], -1)
