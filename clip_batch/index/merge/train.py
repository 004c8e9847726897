"""The template: what the train task leaves for the shards' tasks, and the queries that recall is measured with.

An OUT that is added to an index uses the template of that index, and only draws queries of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_batch.config import parse_bytes
from clip_batch.errors import ConfigError
from clip_batch.index.ann import faiss_index, index_keys
from clip_batch.index.ann.libfaiss import Index
from clip_batch.index.manifest import DuplicateRows
from clip_batch.index.merge import duplicates
from clip_batch.index.merge.attempt import Attempt
from clip_batch.index.merge.job import MergeJob
from clip_batch.index.merge.queries import Queries, draw_queries, filled_rows, held_out_rows
from clip_batch.index.paths import TemplatePaths, VersionPaths
from clip_batch.plan.paths import VECTORS
from clip_batch.storage import npy

MOST_ORDER_LISTS = 4096
"""Most clusters of the k-means that orders the rows of an index without lists."""

TRAIN_BYTES = 16
"""Memory of a training row for each dimension: drawn in float16 twice, in float32, and faiss's copy."""

REFERENCE = "reference."
"""Prefix of the kinds of the index's own queries, when an OUT is added to it."""

Say = Callable[[str], None]
Ids = npt.NDArray[np.int64]
Half = npt.NDArray[np.float16]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Template:
    """The trained empty indices of a merge, its held-out queries, and the rows that it leaves out.

    `keys` has the index key of each modality, `kinds` the kinds of vectors that OUT has, which all are queries.
    `folder`, relative to INDEX, has the trained indices, and `reference` is the file of the index's own queries
    ("" where this OUT is not added to an index). `duplicates` is empty without `--dedup`.
    """

    job: MergeJob
    attempt: str
    keys: dict[str, str]
    kinds: list[str]
    folder: str
    reference: str
    duplicates: DuplicateRows

    @classmethod
    def read(cls, job: MergeJob) -> Template | None:
        """The template of a job; None if it is not trained yet."""
        if (record := job.template_record()) is None:
            return None
        duplicates, folder = record["duplicates"], record["template"]
        return cls(job, record["attempt"], record["keys"], record["kinds"], folder, record["reference"], duplicates)

    @property
    def paths(self) -> TemplatePaths:
        """The files of the attempt that trained: the queries, and the rows that are left out."""
        return self.job.paths.template(self.attempt)

    @property
    def order_modality(self) -> str:
        """The modality by whose lists the rows are ordered."""
        return "image" if "image" in self.keys else next(iter(self.keys))

    def index_path(self, modality: str) -> str:
        """The file of the trained empty index, relative to INDEX."""
        return TemplatePaths(self.folder).index(modality)

    def index(self, modality: str) -> Index:
        """The trained empty index."""
        with self.job.index.fetch(self.index_path(modality)) as path:
            return faiss_index.read(path)

    def queries(self) -> Queries:
        """The held-out queries by kind; the index's own, where OUT is added to it, have the prefix `REFERENCE`."""
        queries = {}
        for prefix, name in (("", self.paths.queries), (REFERENCE, self.reference)):
            if name:
                with self.job.index.fetch(name) as path, np.load(path) as arrays:
                    for kind in VECTORS:
                        if f"{kind}.rows" in arrays:
                            queries[prefix + kind] = arrays[f"{kind}.rows"], arrays[f"{kind}.vectors"]
        return queries

    def assigner(self) -> Callable[[Vectors], Ids]:
        """A function that gives each vector (n, d) its list (n,), by which the rows are ordered."""
        index = self.index(self.order_modality)
        if faiss_index.has_lists(index):
            return partial(faiss_index.assign, index)
        with self.job.index.fetch(TemplatePaths(self.folder).centroids) as path:
            return partial(faiss_index.assign_nearest, np.load(path))

    def left_out(self, start: int, stop: int) -> Ids:
        """The rows among [start, stop) that are left out as duplicates, counted from `start`."""
        if not self.duplicates:
            return np.empty(0, dtype=np.int64)
        with self.job.index.fetch(self.paths.dropped) as path:
            rows: Ids = np.load(path, mmap_mode="r")
            low, high = np.searchsorted(rows, [start, stop])
            return np.asarray(rows[low:high]) - start


def make_template(job: MergeJob, captioned: list[int], attempt: Attempt, progress: Say) -> None:
    """Draw queries, train each modality's index, find duplicates, and commit the attempt.

    `captioned` counts each part's rows with a caption. Errors: see `clip_batch.merge`.
    """
    started = time.monotonic()
    filled = filled_rows(job.source, job.kinds, captioned)
    kinds, keys = list(filled), _index_keys(job, {kind: sum(rows) for kind, rows in filled.items()})
    queries = draw_queries(job.source, filled, job.config)
    _write_queries(attempt, queries)
    folder, reference = attempt.folder, ""
    if job.base:
        paths = VersionPaths(job.base.template)
        base = paths.template(job.index.read_json(paths.template_record)["attempt"])
        folder, reference = base.folder, base.queries
    template = Template(job, attempt.id, keys, kinds, folder, reference, {})
    if not job.base:
        held_out = held_out_rows(queries)
        for modality, index_key in keys.items():
            count = _sample_rows(job, index_key)
            _, sample = job.source.draw(modality, filled[modality], count, job.config.seed, held_out)
            if not len(sample):  # so few rows that every one is a query
                sample = queries[modality][1]
            _train(template, attempt, modality, npy.unit(sample))
            progress(f"{modality}: key {index_key}, trained on {len(sample):,} rows")
    left_out = _find_duplicates(template, attempt, progress) if job.config.dedup else {}
    attempt.commit(
        keys=keys,
        kinds=kinds,
        template=folder,
        reference=reference,
        duplicates=left_out,
        seconds=time.monotonic() - started,
    )


def _index_keys(job: MergeJob, rows: Mapping[str, int]) -> dict[str, str]:
    """The index key of each modality to index, given the number of vectors of each kind that OUT has."""
    keys: dict[str, str] = {name: job.index_key(rows[name]) for name in job.config.modalities if name in rows}
    if job.base:
        keys = dict(job.base.key)
    if not keys:
        raise ConfigError(f"{job.source.store.url} has no vectors of {', '.join(job.config.modalities)} to index")
    if lacking := set(keys) - set(job.kinds):
        raise ConfigError(f"{job.source.store.url} has no {', '.join(lacking)} vectors, which the index has")
    return keys


def _write_queries(attempt: Attempt, queries: Queries) -> None:
    arrays: dict[str, Any] = {}
    for kind, (rows, vectors) in queries.items():
        arrays.update({f"{kind}.rows": rows, f"{kind}.vectors": vectors})
    attempt.write(TemplatePaths().queries, lambda file: np.savez(file, **arrays))


def _sample_rows(job: MergeJob, index_key: str) -> int:
    """The number of rows to train on; ConfigError if max_memory has no room for `train_rows`."""
    room = (parse_bytes(job.config.max_memory) - job.task_bytes) // (TRAIN_BYTES * job.source.dim)
    if job.config.train_rows > room:
        raise ConfigError(f"--max-memory {job.config.max_memory} has room for {max(room, 0):,} --train-rows")
    return job.config.train_rows or max(1, min(room, max(10_000, 64 * index_keys.lists(index_key))))


def _train(template: Template, attempt: Attempt, modality: str, sample: Vectors) -> None:
    """Write the trained index of a modality; also centroids, where it should order the rows but has no lists."""
    names, seed = TemplatePaths(), template.job.config.seed
    index = faiss_index.train(template.keys[modality], sample, seed)
    if modality == template.order_modality and not faiss_index.has_lists(index):
        count = max(1, min(math.isqrt(template.job.source.rows), MOST_ORDER_LISTS, len(sample)))
        centroids = faiss_index.cluster(sample, count, seed)
        attempt.write(names.centroids, lambda file: np.save(file, centroids))
    attempt.write(names.index(modality), lambda file: faiss_index.write(index, file.name))


def _find_duplicates(template: Template, attempt: Attempt, progress: Say) -> DuplicateRows:
    """Write which rows are left out, and the report on them."""
    names, source, threshold = TemplatePaths(), template.job.source, template.job.config.dedup
    repeats = duplicates.find(source, template.order_modality, template.assigner(), threshold, progress)
    attempt.write(names.dropped, lambda file: np.save(file, repeats.rows))
    attempt.write(names.duplicates, lambda file: duplicates.write_report(repeats, source, file.name))
    progress(f"{len(repeats.rows):,} of {source.rows:,} rows repeat an earlier one and are left out")
    return {"rows": len(repeats.rows), "threshold": threshold}
