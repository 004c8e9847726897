"""The template: what the train task leaves for every shard's, and the queries that recall is measured with.

An OUT that is added to an index takes the template of that index, and draws only queries of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_batch.config import parse_bytes
from clip_batch.errors import ConfigError
from clip_batch.index.ann import faiss_index
from clip_batch.index.merge import duplicates
from clip_batch.index.merge.job import CENTROIDS, DROPPED, DUPLICATES, QUERIES, TEMPLATE, Attempt, MergeJob
from clip_batch.plan import paths
from clip_batch.storage import npy

MOST_ORDER_LISTS = 4096
"""Of the k-means that orders the rows of an index without lists."""

TRAIN_BYTES = 16
"""Memory of a training row for each dimension: drawn in float16 twice, in float32, and faiss's copy."""

REFERENCE = "reference."
"""Prefix of the kinds of queries that are the index's own, when an OUT is added to it."""

Say = Callable[[str], None]
Ids = npt.NDArray[np.int64]
Half = npt.NDArray[np.float16]
Vectors = npt.NDArray[np.float32]


def make_template(job: MergeJob, captioned: list[int], attempt: Attempt, progress: Say) -> None:
    """Draw queries, train each modality's index, find duplicates, and commit the attempt.

    `captioned` counts each part's rows with a caption. Errors: see `clip_batch.merge`.
    """
    started = time.monotonic()
    filled = {"image": [commit.rows for commit in job.source.commits], "text": captioned}
    kinds = [kind for kind in job.kinds if sum(filled[kind])]
    modalities = [modality for modality in job.config.modalities if modality in kinds]
    keys: dict[str, str] = {name: job.key(sum(filled[name])) for name in modalities}
    if job.base:
        keys = dict(job.base.key)
    if not keys:
        raise ConfigError(f"{job.source.store.url} has no vectors of {', '.join(job.config.modalities)} to index")
    if lacking := set(keys) - set(job.kinds):
        raise ConfigError(f"{job.source.store.url} has no {', '.join(lacking)} vectors, which the index has")
    queries = {}
    for kind in kinds:
        count = min(job.config.queries, max(1, sum(filled[kind]) // 10))
        queries[kind] = job.source.draw(kind, filled[kind], count, job.config.seed)
    arrays: dict[str, Any] = {}
    for kind, (rows, drawn) in queries.items():
        arrays.update({f"{kind}.rows": rows, f"{kind}.vectors": drawn})
    attempt.write(QUERIES, lambda file: np.savez(file, **arrays))
    template, reference = attempt.folder, ""
    if job.base:
        old = job.index.read_json(f"{job.base.template}/{TEMPLATE}/record.json")
        template = f"{job.base.template}/{TEMPLATE}/{old['attempt']}"
        reference = f"{template}/{QUERIES}"
    else:
        held_out = np.unique(np.concatenate([rows for rows, _ in queries.values()]))
        for modality, key in keys.items():
            wanted = _sample_rows(job, key)
            _, sample = job.source.draw(modality, filled[modality], wanted, job.config.seed, held_out)
            if not len(sample):  # so few rows that every one is a query
                sample = queries[modality][1]
            _make(job, attempt, modality, key, npy.unit(sample), modality == order_modality(keys))
            progress(f"{modality}: key {key}, trained on {len(sample):,} rows")
    record = {"keys": keys, "kinds": kinds, "template": template, "reference": reference}
    record["duplicates"] = _find_duplicates(job, record, attempt, progress) if job.config.dedup else {}
    attempt.commit(**record, seconds=time.monotonic() - started)


def _find_duplicates(job: MergeJob, trained: dict[str, Any], attempt: Attempt, progress: Say) -> dict[str, Any]:
    """Write which rows are left out, and say how many."""
    kind = order_modality(trained["keys"])
    found = duplicates.find(job.source, kind, assigner(job, trained), job.config.dedup, progress)
    attempt.write(DROPPED, lambda file: np.save(file, found.rows))
    attempt.write(DUPLICATES, lambda file: duplicates.write_report(found, job.source, file.name))
    progress(f"{len(found.rows):,} of {job.source.rows:,} rows repeat an earlier one and are left out")
    return {"rows": len(found.rows), "threshold": job.config.dedup}


def left_out(job: MergeJob, trained: dict[str, Any], start: int, stop: int) -> Ids:
    """Which of the rows [start, stop) are left out, counted from `start`."""
    if not trained["duplicates"]:
        return np.empty(0, dtype=np.int64)
    with job.index.fetch(job.drawn(trained, DROPPED)) as path:
        rows: Ids = np.load(path, mmap_mode="r")
        low, high = np.searchsorted(rows, [start, stop])
        return np.asarray(rows[low:high]) - start


def _sample_rows(job: MergeJob, key: str) -> int:
    """Rows to train on; ConfigError if max_memory has no room for as many as were asked for."""
    room = (parse_bytes(job.config.max_memory) - job.task_bytes) // (TRAIN_BYTES * job.source.dim)
    if job.config.train_rows > room:
        raise ConfigError(f"--max-memory {job.config.max_memory} has room for {max(room, 0):,} --train-rows")
    return job.config.train_rows or max(1, min(room, max(10_000, 64 * faiss_index.lists(key))))


def _make(job: MergeJob, attempt: Attempt, modality: str, key: str, sample: Vectors, orders: bool) -> None:
    """The template of a modality; where its lists cannot order the rows and it should, centroids that can."""
    template = faiss_index.train(key, sample, job.config.seed)
    if orders and not faiss_index.has_lists(template):
        count = max(1, min(math.isqrt(job.source.rows), MOST_ORDER_LISTS, len(sample)))
        centroids = faiss_index.cluster(sample, count, job.config.seed)
        attempt.write(CENTROIDS, lambda file: np.save(file, centroids))
    attempt.write(f"{modality}.index", lambda file: faiss_index.write(template, file.name))


def order_modality(keys: dict[str, str]) -> str:
    """The modality by whose lists the rows are ordered."""
    return "image" if "image" in keys else next(iter(keys))


def read_queries(job: MergeJob, trained: dict[str, Any]) -> dict[str, tuple[Ids, Half]]:
    """Held-out queries by kind, with their rows in OUT; those of the index that is added to as reference.<kind>."""
    found = {}
    for prefix, path in (("", job.drawn(trained, QUERIES)), (REFERENCE, trained["reference"])):
        if path:
            with job.index.fetch(path) as local, np.load(local) as saved:
                for kind in paths.VECTORS:
                    if f"{kind}.rows" in saved:
                        found[prefix + kind] = saved[f"{kind}.rows"], saved[f"{kind}.vectors"]
    return found


def read_template(job: MergeJob, trained: dict[str, Any], modality: str) -> Any:
    """The trained empty index."""
    with job.index.fetch(job.template(trained, f"{modality}.index")) as path:
        return faiss_index.read(path)


def assigner(job: MergeJob, trained: dict[str, Any]) -> Callable[[Vectors], Ids]:
    """What gives each vector (n, d) its list (n,): the order of the rows."""
    template = read_template(job, trained, order_modality(trained["keys"]))
    if faiss_index.has_lists(template):
        return partial(faiss_index.assign, template)
    with job.index.fetch(job.template(trained, CENTROIDS)) as path:
        return partial(faiss_index.assign_nearest, np.load(path))
