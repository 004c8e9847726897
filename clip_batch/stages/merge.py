"""Merge: from committed parts to a version of the index, complete or not there at all.

    train (one task) -> build_shard 0, 1, ... (any order, any process) -> publish (one task)

Each task finds what it needs in storage and creates its record last, so each resumes by itself, and
of attempts at one task, at once or not, the first to record wins. The version's name is a digest of
the commits and the options: a killed merge goes on where it was, a changed OUT makes a new version,
and CURRENT moves only when that one's manifest stands.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_batch import index, metadata, recall, vectors
from clip_batch.config import MergeConfig, StorageConfig, parse_bytes
from clip_batch.errors import ConfigError, IncompleteError
from clip_batch.job import CENTROIDS, QUERIES, TRUTH, Attempt, Job, open_job
from clip_batch.manifest import MANIFEST, IndexShard, Manifest, load_manifest, make_current, publish_manifest
from clip_batch.types import format_numbers

MOST_ORDER_LISTS = 4096
"""Of the k-means that orders the rows of an index without lists."""

SATURATED = 0.99
"""A doubled effort that leaves this share of the scores as they were is not doubled again for the trial."""

Say = Callable[[str], None]
Ids = npt.NDArray[np.int64]
Half = npt.NDArray[np.float16]


def merge(
    output: str,
    index: str,
    config: MergeConfig,
    storage: StorageConfig = StorageConfig(),
    progress: Say = lambda line: None,
) -> Manifest:
    """Build a version of INDEX from OUT, or find it finished; all tasks in this process, one after another.

    IncompleteError: partitions are not committed (and not `allow_partial`). CorruptError: a committed
    file is not what its commit says, or a vector is not finite and of unit norm. ConfigError: an
    option is wrong, or faiss refuses the key. PlanError: OUT has no plan.
    """
    job = open_job(output, index, config, storage)
    if manifest := finished(job, progress):
        return manifest
    train(job, progress)
    for shard in range(job.shards):
        build_shard(job, shard, progress)
    return publish(job, progress)


def finished(job: Job, progress: Say = lambda line: None) -> Manifest | None:
    """The manifest of a version that stands, which is CURRENT then; None while it is being made."""
    if not job.index.exists(job.path(MANIFEST)):
        return None
    make_current(job.index, job.version)
    progress(f"version {job.version} stands already")
    return load_manifest(job.index, job.version)


def train(job: Job, progress: Say = lambda line: None) -> None:
    """Check every part, hold queries out, train a template for each modality. Does nothing if it has ended."""
    if job.source.missing:
        progress(f"merging without partitions {format_numbers(job.source.missing)}")
    if job.trained():
        progress(f"version {job.version} is trained already")
        return
    with job.try_train() as attempt:
        _train(job, attempt, progress)
    if not attempt.won:
        progress("another attempt has trained first: its template is taken")


def _train(job: Job, attempt: Attempt, progress: Say) -> None:
    started = time.monotonic()
    modalities = [modality for modality in job.config.modalities if modality in job.kinds]
    captioned = vectors.check_files(job.source, job.kinds)
    filled = {"image": [commit.rows for commit in job.source.commits], "text": captioned}
    kinds = [kind for kind in job.kinds if sum(filled[kind])]
    keys: dict[str, str] = {name: _key(job, sum(filled[name])) for name in modalities if name in kinds}
    if not keys:
        raise ConfigError(f"{job.source.store.url} has no vectors of {', '.join(job.config.modalities)} to index")
    seed = job.config.seed
    queries = {}
    for kind in kinds:
        count = min(job.config.queries, max(1, sum(filled[kind]) // 10))
        queries[kind] = vectors.draw(job.source, kind, filled[kind], count, seed)
    held_out = np.unique(np.concatenate([rows for rows, _ in queries.values()]))
    for modality, key in keys.items():
        wanted = job.config.train_rows or max(10_000, 64 * index.lists(key))
        _, sample = vectors.draw(job.source, modality, filled[modality], wanted, seed, held_out)
        if not len(sample):  # so few rows that every one is a query
            sample = queries[modality][1]
        exact = vectors.unit(sample)
        template = index.train(key, exact, seed)
        if modality == _order_modality(keys) and not index.has_lists(template):
            count = max(1, min(math.isqrt(job.source.rows), MOST_ORDER_LISTS, len(exact)))
            centroids = index.cluster(exact, count, seed)
            attempt.write(CENTROIDS, lambda file, centroids=centroids: np.save(file, centroids))  # type: ignore[misc]
        attempt.write(f"{modality}.index", lambda file, made=template: index.write(made, file.name))  # type: ignore[misc]
        progress(f"{modality}: key {key}, trained on {len(sample):,} rows")
    arrays: dict[str, Any] = {}
    for kind, (rows, drawn) in queries.items():
        arrays.update({f"{kind}.rows": rows, f"{kind}.vectors": drawn})
    attempt.write(QUERIES, lambda file: np.savez(file, **arrays))
    attempt.commit(keys=keys, kinds=kinds, seconds=time.monotonic() - started)


def _key(job: Job, rows: int) -> str:
    if job.config.index_key != "auto":
        return job.config.index_key
    memory = parse_bytes(job.config.max_memory) // len(job.config.modalities)
    return index.choose_key(rows, job.source.dim, memory, job.config.flat_rows)


def _order_modality(keys: dict[str, str]) -> str:
    """The modality by whose lists the rows are ordered."""
    return "image" if "image" in keys else next(iter(keys))


def build_shard(job: Job, shard: int, progress: Say = lambda line: None) -> None:
    """One index shard: assign, sort, add; metadata in the same order; its part of the recall trial.

    If its record stands, only gives the files their final names where that is left to do. Memory: the
    shard's float16 vectors of both kinds, one index and the metadata. ConfigError: not trained yet.
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


def _build(job: Job, trained: dict[str, Any], shard: int, attempt: Attempt) -> None:
    started, name = time.monotonic(), job.shard_name(shard)
    keys, (start, stop) = trained["keys"], job.bounds(shard)
    table = vectors.read_metadata(job.source, start, stop)
    empty = np.asarray(table["caption"].is_null())
    data: dict[str, Half] = {}
    for kind in trained["kinds"]:
        data[kind] = vectors.read_vectors(job.source, kind, start, stop)
        vectors.check_rows(job.source, kind, start, data[kind], empty if kind == "text" else None)
    order = _order(job, trained, data[_order_modality(keys)])
    attempt.write(f"metadata/{name}.arrow", lambda file: metadata.write_ordered(table, order, file.name))
    with job.index.fetch(job.template(trained, QUERIES)) as path, np.load(path) as saved:
        queries = dict(saved)
    trials = {}
    for modality in keys:
        rows = data[modality][order]
        made = _fill(_template(job, trained, modality), rows)
        attempt.write(f"{modality}/{name}.index", lambda file, made=made: index.write(made, file.name))  # type: ignore[misc]
        for kind in trained["kinds"]:
            own = np.full(len(queries[f"{kind}.rows"]), -1)
            if kind == modality:
                own = _places(queries[f"{kind}.rows"] - start, order)
            trial = _try(made, rows, vectors.unit(queries[f"{kind}.vectors"]), own)
            trials.update({f"{modality}.{kind}.{field}": array for field, array in vars(trial).items()})
        del made, rows
    attempt.write(f"{TRUTH}/{name}.npz", lambda file: np.savez(file, **trials))
    attempt.commit(rows=stop - start, seconds=time.monotonic() - started)


def _template(job: Job, trained: dict[str, Any], modality: str) -> Any:
    """The trained empty index."""
    with job.index.fetch(job.template(trained, f"{modality}.index")) as path:
        return index.read(path)


def _blocks(count: int) -> list[slice]:
    return [slice(low, min(low + vectors.BLOCK, count)) for low in range(0, count, vectors.BLOCK)]


def _order(job: Job, trained: dict[str, Any], data: Half) -> Ids:
    """The shard's rows (n,) sorted by inverted list, stable."""
    template = _template(job, trained, _order_modality(trained["keys"]))
    if index.has_lists(template):
        found = [index.assign(template, vectors.unit(data[block])) for block in _blocks(len(data))]
    else:
        with job.index.fetch(job.template(trained, CENTROIDS)) as path:
            centroids = np.load(path)
        found = [index.assign_nearest(centroids, vectors.unit(data[block])) for block in _blocks(len(data))]
    order: Ids = np.argsort(np.concatenate(found), kind="stable")
    return order


def _fill(template: Any, rows: Half) -> Any:
    """The template filled with rows (n, d), ids 0 to n - 1; zero rows (no caption) are left out."""
    filled = np.flatnonzero(np.any(rows != 0, axis=1))
    made = template if len(filled) == len(rows) else index.with_ids(template)
    for block in _blocks(len(filled)):
        index.add(made, vectors.unit(rows[filled[block]]), filled[block])
    return made


def _places(rows: Ids, order: Ids) -> Ids:
    """Where rows of the shard, numbered before sorting, are after it; -1 for rows of other shards."""
    after = np.empty_like(order)
    after[order] = np.arange(len(order))
    inside = (rows >= 0) & (rows < len(order))
    return np.where(inside, after[np.where(inside, rows, 0)], -1)


def _try(made: Any, rows: Half, queries: npt.NDArray[np.float32], own: Ids) -> recall.Trial:
    """Exact and, at every effort, found neighbours of the queries among the shard's rows."""
    depth = recall.TOP + 1  # one of them may be the query itself
    scores, ids = np.empty((len(queries), 0), dtype=np.float32), np.empty((len(queries), 0), dtype=np.int64)
    filled = np.flatnonzero(np.any(rows != 0, axis=1))
    for block in _blocks(len(filled)):
        more, places = index.nearest(queries, vectors.unit(rows[filled[block]]), depth)
        scores, ids = np.hstack([scores, more]), np.hstack([ids, filled[block][places]])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
        scores, ids = np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)
    found: list[tuple[npt.NDArray[np.float32], Ids]] = []
    for effort in index.efforts(made) or [0]:
        if len(found) > 1 and np.mean(found[-1][0] == found[-2][0]) > SATURATED:
            found.append(found[-1])
        else:
            found.append(index.search(made, queries, depth, effort or None))
    return recall.measure(queries, own, lambda wanted: vectors.unit(rows[wanted]), ids, found)


def publish(job: Job, progress: Say = lambda line: None) -> Manifest:
    """Fold the shards' trials, choose the effort, write the manifest, let the version serve.

    First it gives files their final names where an attempt died before it had, and removes what other
    attempts left. May run twice at once: the first manifest stands. IncompleteError: a shard is not built.
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
    job.clean(trained)
    effort: dict[str, int | None] = {}
    measured: dict[str, dict[str, dict[str, float]]] = {}
    for modality in trained["keys"]:
        trials = {kind: _fold(job, f"{modality}.{kind}") for kind in trained["kinds"]}
        candidates = index.efforts(_template(job, trained, modality))
        at, reached = recall.least_effort(list(trials.values()), job.config.recall_target)
        effort[modality] = candidates[at] if candidates else None
        measured[modality] = {kind: line for kind, trial in trials.items() if (line := recall.summary(trial, at))}
        shown = ", ".join(f"{kind} queries {line['10']:.3f}" for kind, line in measured[modality].items())
        progress(f"{modality}: recall@10 {shown or 'not measurable'} at effort {effort[modality]}")
        if not reached:
            progress(f"{modality}: no effort reaches recall@10 of {job.config.recall_target}: the largest is recorded")
    made = Manifest(
        version=job.version,
        created=time.time(),
        dim=job.source.dim,
        rows=job.source.rows,
        encoder=job.source.plan.encoder,
        plan=job.source.plan.digest,
        key=trained["keys"],
        effort=effort,
        recall=measured,
        recall_target=job.config.recall_target,
        missing=job.source.missing,
        allow_partial=job.config.allow_partial,
        shards=tuple(
            IndexShard(job.shard_name(shard), record["rows"], job.bounds(shard)[0], _index_files(record))
            for shard, record in records.items()
        ),
    )
    return publish_manifest(job.index, made)


def _index_files(record: dict[str, Any]) -> dict[str, Any]:
    return {name: file for name, file in record["files"].items() if not name.startswith(TRUTH)}


def _fold(job: Job, prefix: str) -> recall.Trial:
    """One trial over all shards, a shard at a time."""
    whole: recall.Trial | None = None
    for shard in range(job.shards):
        with job.index.fetch(job.path(f"{TRUTH}/{job.shard_name(shard)}.npz")) as path, np.load(path) as saved:
            trial = recall.Trial(*(saved[f"{prefix}.{field}"] for field in ("exact", "ranked", "true")))
        whole = recall.fold(whole, trial) if whole else trial
    assert whole is not None
    return whole
