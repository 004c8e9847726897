"""Merge: from the committed parts of OUTs to a finished version of the index, or none at all.

    train (one task) -> build_shard 0, 1, ... (any order, any process) -> publish (one task)

Each task reads what it needs from storage and creates its record last, so each can be run again by itself, and of
several attempts at a task the first to create its record wins. The version's name is a digest of the commits and the
options: a killed merge resumes where it was, a changed OUT makes a new version, and CURRENT names a version only once
its manifest exists.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace

from clip_batch.config import MergeConfig, StorageConfig
from clip_batch.config.paths import path_text
from clip_batch.embeddings.status import describe_partitions
from clip_batch.errors import ClipBatchError, ConflictError, IncompleteError
from clip_batch.index import removals, removed_rows
from clip_batch.index.ann import index_keys, ondisk
from clip_batch.index.manifest import IndexShard, Manifest, MergedOutput, load_manifest
from clip_batch.index.merge.go_live import make_live, refuse_less, untrained
from clip_batch.index.merge.job import MergeJob, ShardRecord, open_job
from clip_batch.index.merge.shard import build
from clip_batch.index.merge.train import Template, make_template
from clip_batch.index.merge.tune import tune
from clip_batch.index.paths import TRUTH
from clip_batch.index.publications import TRIES, read_state
from clip_batch.index.versions import broken, drop
from clip_batch.storage.allocator import give_back
from clip_batch.storage.store import file_digest
from clip_batch.types import StoredFile, StrPath, format_numbers

Say = Callable[[str], None]


def merge(
    output: StrPath | Iterable[StrPath],
    index: StrPath,
    config: MergeConfig = MergeConfig(),
    *,
    storage: StorageConfig = StorageConfig(),
    progress: Say | None = None,
) -> Manifest:
    """Build a version of INDEX from OUT, unless it is finished already, and return its manifest.

    `output` is one folder of embeddings, or several that one encoder made; with `anew` none of them means those of the
    live version. A row that several have, or with `add` the index has, is merged once.
    All tasks run in this process, one after another. Every row is checked as it is read, before its shard is built.
    With `add` it begins again, up to `TRIES` times, if another version goes live meanwhile.

    IncompleteError: partitions are not committed (and not `allow_partial`). CorruptError: a committed file is not what
    its commit says, or a vector is not finite and of unit norm. ConfigError: an option is wrong, faiss refuses the key,
    a source shard has another content than before (and not `replace`), or the live version holds more (and not
    `anew`). ConflictError: it does since this merge began. PlanError: OUT has no plan.
    """
    MergeConfig.expect(config=config), StorageConfig.expect(storage=storage)
    say = progress or (lambda line: None)
    places = output_urls(output), path_text(index, "index")
    for _ in range(TRIES):
        job = open_job(*places, config, storage)
        try:
            return run_all(job, say)
        except ConflictError:
            if not config.add:
                raise
            # Its files stay for gc: the same merge may run in another process, too.
            say(f"another version went live meanwhile, so {job.version} is given up and the merge begins again")
    return run_all(open_job(*places, config, storage), say)


def run_all(job: MergeJob, say: Say = lambda line: None) -> Manifest:
    """Run all tasks of a job, one after another, and return the manifest. Errors: as `merge`."""
    if manifest := finished(job, say, rebuild=True):
        return manifest
    train(job, say)
    for shard in range(job.shards):
        build_shard(job, shard, say)
    return publish(job, say, whole=True)


def output_urls(output: StrPath | Iterable[StrPath]) -> list[str]:
    """OUTs as URLs. ConfigError: one of them is neither a path nor a URL."""
    outputs = output if isinstance(output, Iterable) and not isinstance(output, str | bytes) else [output]
    return [path_text(each, "output") for each in outputs]


def finished(
    job: MergeJob, progress: Say = lambda line: None, rebuild: bool = False, whole: bool = False
) -> Manifest | None:
    """The manifest of the job's version if it is finished, made live and rid of left-over files; None otherwise.

    Where the live version was added to it, or has all of OUT already, nothing is to do, and that one is returned.

    With `rebuild`, for the first task of a merge alone, a finished version that has lost a file since is deleted, so
    that it is built anew; and where it is to be built, ConfigError is raised if it could not go live. `whole`: see
    `publish`.
    """
    if job.base and job.nothing_new:
        progress(f"version {job.base.version} knows all rows of {job.source.urls} already: nothing is added")
        return job.base
    if rebuild and job.version == job.live and job.version in read_state(job.index).dropping:
        drop(job.index, job.version, rebuild=True)  # by a merge that was killed before it built it anew
    if not job.index.exists(job.paths.manifest):
        if rebuild and not job.config.add:
            refuse_less(job)
        return None
    manifest = load_manifest(job.index, job.version)
    own = {name: file for name, file in manifest.files.items() if name.startswith(f"{job.version}/")}
    if rebuild and (problem := broken(job.index, own)):
        progress(f"{problem}: version {job.version} is built anew")
        drop(job.index, job.version, rebuild=True)
        return None
    if larger := _added_to(job):
        stays = f"{larger.version}, which was added to it, stays live (--anew takes its place)"
        progress(f"version {job.version} is finished already, and {stays}")
        return larger
    make_live(job, manifest, job.live if rebuild or whole else _began(job))
    _tidy(job, manifest)
    progress(f"version {job.version} is finished already")
    return manifest


def _added_to(job: MergeJob) -> Manifest | None:
    """The live version, if it has the shards of the job's version and more, and is not to be replaced."""
    if job.config.anew or job.live in (None, job.version):
        return None
    with contextlib.suppress(ClipBatchError):  # a live version that cannot be read is replaced
        live = load_manifest(job.index, job.live)
        if any(shard.version == job.version for shard in live.shards):
            return live
    return None


def _began(job: MergeJob) -> str | None:
    """The version that was live when the job was trained, as far as that is recorded."""
    record = job.template_record()
    return record.get("replaces", job.live) if record else job.live


def train(job: MergeJob, progress: Say = lambda line: None) -> None:
    """Check every part, hold queries out, train a template for each modality; nothing if that was done already.

    Headers, sizes and counts are checked here, rows by the shards' tasks.
    """
    for output, source in zip(job.outputs, job.source.sources, strict=True):
        of = f" of {output.output}" if len(job.outputs) > 1 else ""
        if source.missing:
            progress(f"merging without partitions {format_numbers(source.missing)}{of}")
        empty = {str(commit.partition): commit.empty for commit in source.empty}
        for line in describe_partitions(empty, f"without a row: clip-batch status lists them{of}"):
            progress(line)
    if job.template_record():
        progress(f"version {job.version} is trained already")
        return
    captioned = job.source.check_files()
    with job.attempt_training() as attempt:
        make_template(job, captioned, attempt, progress)
    give_back()  # the sample's memory, before the shards take theirs
    if not attempt.won:
        progress("another attempt trained first: its template is used")


def build_shard(job: MergeJob, shard: int, progress: Say = lambda line: None) -> None:
    """Build one index shard (see `clip_batch.index.merge.shard`), and give its files their final names.

    If its record exists, only the latter; nothing where no row is new. ConfigError: the template is not trained yet.
    """
    if job.nothing_new:
        return None
    at = f"index shard {shard + 1} of {job.shards}"
    if record := job.shard_record(shard):
        progress(f"{at} is built already")
        return job.settle(shard, record)
    if not (template := Template.read(job)):
        raise untrained(job)
    with job.attempt_shard(shard) as attempt:
        build(template, shard, attempt)
    by = "" if attempt.won else ", by another attempt"
    progress(f"{at}: {attempt.record['rows']:,} rows in {attempt.record['seconds']:.1f} s{by}")
    job.settle(shard, attempt.record)


def publish(job: MergeJob, progress: Say = lambda line: None, whole: bool = False) -> Manifest:
    """Fold the shards' trials, choose the effort, write the manifest, make the version live.

    First it gives files their final names where an attempt died before it had; last it removes the files of the other
    attempts. It may run twice at once: the first manifest counts. IncompleteError: a shard is not built. ConflictError:
    the version that was live when this merge began is no longer (see `clip_batch.index.merge.go_live`). It began when
    the version was trained; where all tasks are run together (`whole`), when the job was opened.
    """
    if manifest := finished(job, progress, whole=whole):
        return manifest
    template = Template.read(job)
    if not template:
        raise untrained(job)
    records = {shard: record for shard in range(job.shards) if (record := job.shard_record(shard))}
    if len(records) < job.shards:
        missing = format_numbers(set(range(job.shards)) - set(records))
        raise IncompleteError(f"{job.index.url}/{job.version}: index shards {missing} are not built: merge again")
    for shard, record in records.items():
        job.settle(shard, record)
    tuning, shards, base = tune(template, progress), _shards(job, records), job.base
    single = dict(base.single) if base else {}
    if job.config.layout == "single" and not base:
        with_lists = [modality for modality, key in template.keys.items() if index_keys.lists(key)]
        single = {modality: _join(template, modality, shards) for modality in with_lists or template.keys}
        shards = [replace(shard, files=_without(shard.files, single)) for shard in shards]
    duplicates = template.duplicates
    if duplicates:
        duplicates = {**duplicates, "file": template.paths.duplicates}
    manifest = Manifest(
        version=job.version,
        created=time.time(),
        dim=job.source.dim,
        rows=sum(shard.rows for shard in shards),
        encoder=base.encoder if base and base.encoder.weights else job.encoder,
        plan=base.plan if base else job.outputs[0].plan,
        key=template.keys,
        effort=tuning.effort,
        recall=tuning.recall,
        recall_target=job.config.recall_target,
        missing=base.missing if base else job.outputs[0].missing,
        allow_partial=job.config.allow_partial or bool(base and base.allow_partial),
        shards=tuple(shards),
        sources=(*(base.sources if base else ()), *_sources(template)),
        rerank=template.rerank,
        efforts=tuning.efforts,
        tried=template.tried,
        single=single,
        base=base.version if base else "",
        template=base.template if base else job.version,
        drift=tuning.drift,
        duplicates=duplicates,
        predicted=tuning.predicted,
        replaced=template.own_file(template.paths.replaced) or (base.replaced if base else {}),
    )
    _check_removals(job, manifest)
    job.index.create(job.paths.manifest, manifest.to_json().encode())
    published = load_manifest(job.index, job.version)  # where two tasks publish at once, the first one's
    make_live(job, published, job.live if whole else _began(job))
    _tidy(job, published)
    return published


def _tidy(job: MergeJob, manifest: Manifest) -> None:
    """Remove the files of attempts that did not win, and the indices of shards that were joined.

    Whoever finds the manifest does this: the task that published it may have died.
    """
    if record := job.template_record():
        job.remove_attempts(record["attempt"])
    for shard in range(job.shards) if not manifest.base else ():
        for modality in manifest.single:
            job.index.remove(job.paths.index(modality, job.shard_name(shard)))


def _check_removals(job: MergeJob, manifest: Manifest) -> None:
    """ConfigError where the version's metadata lacks a column that rows are removed by: nobody could open it."""
    lists = list(removals.load_all(job.index, removals.names(job.index)))
    new = {shard.source: shard for shard in manifest.shards if not shard.version}
    for shard in new.values() if lists else ():
        schema = removed_rows.read_schema(job.index, job.paths.metadata(shard.name))
        for each in lists:
            removed_rows.check_column(each, schema)


def _sources(template: Template) -> list[MergedOutput]:
    """The OUTs that are merged now, with what the version holds of each."""
    job = template.job
    return [
        replace(
            output,
            standing=known + standing,
            held=template.own_file(template.paths.held(number)),
        )
        for number, (output, known, standing) in enumerate(
            zip(job.outputs, job.overlap.known, template.standing or [0] * len(job.outputs), strict=True)
        )
    ]


def _shards(job: MergeJob, records: dict[int, ShardRecord]) -> list[IndexShard]:
    """The shards of the base, followed by those built now, without those whose rows were all left out."""
    shards, source = [], 0
    if job.base:
        shards = [replace(shard, version=shard.version or job.base.version) for shard in job.base.shards]
        source = len(job.base.sources)
    offset = sum(shard.rows for shard in shards)
    for number, record in records.items():
        if record["rows"]:
            files = _without(record["files"], (TRUTH,))
            shards.append(
                IndexShard(job.shard_name(number), record["rows"], offset, files, source=source + job.output(number))
            )
            offset += record["rows"]
    return shards


def _without(files: dict[str, StoredFile], folders: Iterable[str]) -> dict[str, StoredFile]:
    """The files of a shard except those in some folders; vectors (.npy) stay."""
    prefixes = tuple(f"{folder}/" for folder in folders)
    return {name: file for name, file in files.items() if not name.startswith(prefixes) or name.endswith(".npy")}


def _join(template: Template, modality: str, shards: list[IndexShard]) -> dict[str, StoredFile]:
    """Join the shards' indices of a modality into one on disk, and return its files by their path below INDEX."""
    job, files = template.job, dict[str, StoredFile]()
    joined = job.paths.joined(modality)
    with ExitStack() as stack:
        if job.index.local:
            folder = job.index.path(job.paths.attempt("join", secrets.token_hex(4)))
            os.makedirs(folder)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="clip-batch-"))
        template_path = stack.enter_context(template.fetch(template.index_path(modality)))
        parts = [
            (stack.enter_context(job.index.fetch(job.paths.index(modality, shard.name))), shard.offset)
            for shard in shards
        ]
        base_name = os.path.basename(joined)
        ondisk.join(template_path, parts, os.path.join(folder, base_name))
        for name in os.listdir(folder):
            path, final = os.path.join(folder, name), joined.replace(base_name, name)
            files[final] = {"bytes": os.path.getsize(path), "sha256": file_digest(path)}
            job.index.adopt(path, final)
    return files
