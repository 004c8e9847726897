"""The template: what the train task leaves for the shards' tasks, and the queries that recall is measured with.

An OUT that is added to an index uses the template of that index, and only draws queries of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_batch.config import parse_bytes
from clip_batch.errors import ConfigError, CorruptError
from clip_batch.index import held, kept
from clip_batch.index.ann import clusters, faiss_index, index_keys
from clip_batch.index.ann.index_keys import Choice
from clip_batch.index.ann.libfaiss import Index
from clip_batch.index.ann.predictor import Predictor
from clip_batch.index.kept import Files
from clip_batch.index.manifest import DuplicateRows, Manifest
from clip_batch.index.merge import duplicate_report, duplicate_share, duplicates, live_duplicates, overlap, predict
from clip_batch.index.merge.attempt import Attempt
from clip_batch.index.merge.choose import choose
from clip_batch.index.merge.duplicates import Duplicates
from clip_batch.index.merge.job import MergeJob
from clip_batch.index.merge.live_duplicates import LiveRows
from clip_batch.index.merge.overlap import LeftOut
from clip_batch.index.merge.queries import Queries, draw_queries, filled_rows, held_out_rows
from clip_batch.index.paths import TemplatePaths, VersionPaths
from clip_batch.index.removed_rows import contains, fetch_metadata, removed_ids, replaced_ids
from clip_batch.plan.paths import VECTORS
from clip_batch.storage import npy
from clip_batch.storage.store import Store
from clip_batch.types import StoredFile

MOST_ORDER_LISTS = 4096
"""Most clusters of the k-means that orders the rows of an index without lists."""

TRAIN_BYTES = 16
"""Memory of a training row for each dimension: drawn in float16 twice, in float32, and faiss's copy."""

LEAST_SAMPLE = 50_000
"""Rows that are drawn to train on and to try index keys on, where there are so many."""

FEW_ROWS = 20_000
"""Rows of OUT up to which `--dedup` compares each with all others, whatever their lists: about a second for 512."""

REFERENCE = "reference."
"""Prefix of the kinds of the index's own queries, when an OUT is added to it."""

Say = Callable[[str], None]
Ids = npt.NDArray[np.int64]
Half = npt.NDArray[np.float16]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Template:
    """The trained empty indices of a merge, its held-out queries, and the rows that it leaves out.

    `keys` has the index key of each modality, `kinds` the kinds of vectors that OUTs have, which all are queries.
    `rerank` is how many times k candidates are re-ranked (0: none), `tried` what was tried before the keys were chosen.
    `folder`, relative to INDEX, has the trained indices, and `reference` is the file of the index's own queries
    ("" where this OUT is not added to an index). `duplicates` is empty without `--dedup`.
    `predictors[modality][kind]` has the file of a predictor of lists, by its
    path below INDEX, where there is one. `standing` counts the rows of each OUT that are left out as the index, or an
    earlier OUT, has them. `files` are all of these files, by their path below INDEX.
    """

    job: MergeJob
    attempt: str
    keys: dict[str, str]
    kinds: list[str]
    folder: str
    reference: str
    duplicates: DuplicateRows
    rerank: int
    tried: dict[str, list[dict[str, Any]]]
    predictors: dict[str, dict[str, dict[str, StoredFile]]]
    standing: tuple[int, ...]
    files: Files

    @classmethod
    def read(cls, job: MergeJob) -> Template | None:
        """The template of a job; None if it is not trained yet."""
        if (record := job.template_record()) is None:
            return None
        files = kept.template_files(job.paths, record)
        if job.base:
            files |= base_template(job.index, job.base)[1]
        return cls(
            job,
            record["attempt"],
            record["keys"],
            record["kinds"],
            record["template"],
            record["reference"],
            record["duplicates"],
            record["rerank"],
            record["tried"],
            record["predictors"],
            tuple(record.get("standing", ())),  # a merge that an older clip-batch began has none
            files,
        )

    @property
    def paths(self) -> TemplatePaths:
        """The files of the attempt that trained: the queries, and the rows that are left out."""
        return self.job.paths.template(self.attempt)

    @property
    def order_modality(self) -> str:
        """The modality by whose lists the rows are ordered."""
        return _order_modality(self.keys)

    def index_path(self, modality: str) -> str:
        """The file of the trained empty index, relative to INDEX."""
        return TemplatePaths(self.folder).index(modality)

    @cached_property
    def trials(self) -> Files:
        """The files of the recall trials of all shards, once they are built, by their path below INDEX."""
        job, files = self.job, dict[str, StoredFile]()
        shards = [(job.paths, job.shard_name(shard)) for shard in range(job.shards)]
        shards += [(job.base.paths(shard), shard.name) for shard in job.base.shards] if job.base else []
        for version, name in shards:
            files |= kept.trial_file(job.index, version, name)
        return files

    def fetch(self, name: str) -> AbstractContextManager[str]:
        """A local path of one of `files` or `trials`. CorruptError: it is missing, or has another content."""
        own = name.startswith(f"{self.job.version}/")
        remedy = f"drop the version {self.job.version} (clip-batch versions --drop) and merge again"
        stored = self.files.get(name) or self.trials[name]
        return kept.fetched(self.job.index, name, stored, remedy if own else kept.ADD_REMEDY)

    def index(self, modality: str) -> Index:
        """The trained empty index."""
        with self.fetch(self.index_path(modality)) as path:
            return faiss_index.read(path)

    def read_predictors(self, modality: str) -> dict[str, Predictor]:
        """The predictors of lists by the kind of queries that they are for."""
        predictors = {}
        for kind, files in self.predictors.get(modality, {}).items():
            for name in files:
                with self.fetch(name) as path:
                    predictors[kind] = Predictor.of_array(np.load(path))
        return predictors

    def queries(self) -> Queries:
        """The held-out queries by kind; the index's own, where OUT is added to it, have the prefix `REFERENCE`."""
        queries = {}
        for prefix, name in (("", self.paths.queries), (REFERENCE, self.reference)):
            if name:
                with self.fetch(name) as path, np.load(path) as arrays:
                    for kind in VECTORS:
                        if f"{kind}.rows" in arrays:
                            queries[prefix + kind] = arrays[f"{kind}.rows"], arrays[f"{kind}.vectors"]
        return queries

    def assigner(self, count: int = 1) -> Callable[[Vectors], Ids]:
        """A function that gives each vector (n, d) its `count` nearest lists, or as many as there are: (n, count).

        The rows are ordered by the first.
        """
        index = self.index(self.order_modality)
        if faiss_index.has_lists(index):
            return faiss_index.some_assigner(index, count)
        with self.fetch(TemplatePaths(self.folder).centroids) as path:
            return clusters.some_nearest_of(np.load(path), count)

    def left_out(self, start: int, stop: int) -> Ids:
        """The rows among [start, stop) that are left out, as they repeat others or stand already; from `start`."""
        pieces = [np.empty(0, dtype=np.int64)]
        for name in (self.paths.dropped, self.paths.standing):
            if name in self.files:
                with self.fetch(name) as path:
                    rows: Ids = np.load(path, mmap_mode="r")
                    pieces.append(np.asarray(rows[slice(*np.searchsorted(rows, [start, stop]))]) - start)
        return np.unique(np.concatenate(pieces))

    def own_file(self, name: str) -> Files:
        """A file of the attempt that trained, by its path below INDEX; none where it was not written."""
        return {name: self.files[name]} if name in self.files else {}


def make_template(job: MergeJob, captioned: list[int], attempt: Attempt, progress: Say) -> None:
    """Draw queries, train each modality's index, find duplicates, and commit the attempt.

    `captioned` counts each part's rows with a caption. Errors: see `clip_batch.merge`.
    """
    started = time.monotonic()
    left_out = _leave_out(job, attempt, progress)
    filled = filled_rows(job.source, captioned, left_out.rows)
    kinds, modalities = list(filled), _modalities(job, filled)
    queries = draw_queries(job.source, filled, job.config, left_out.rows)
    _write_queries(attempt, queries)
    if job.base:
        if problem := next(kept.problems(job.index, job.base, deep=True), None):
            raise CorruptError(f"{job.index.url}: {': '.join(problem)}")
        record, files = base_template(job.index, job.base)
        base = VersionPaths(job.base.template).template(record["attempt"])
        template = Template(
            job,
            attempt.id,
            dict(job.base.key),
            kinds,
            base.folder,
            base.queries,
            {},
            job.base.rerank,
            job.base.tried,
            record.get("predictors", {}),  # older versions have none
            left_out.standing,
            files,
        )
    else:
        standing = left_out.standing
        template = Template(job, attempt.id, {}, kinds, attempt.folder, "", {}, 0, {}, {}, standing, {})
        held_out = held_out_rows(queries, left_out.rows)
        template = _train(template, attempt, modalities, filled, queries, held_out, progress)
    repeats = _find_duplicates(template, attempt, left_out, progress) if job.config.dedup and filled else {}
    attempt.commit(
        keys=template.keys,
        kinds=kinds,
        template=template.folder,
        reference=template.reference,
        duplicates=repeats,
        rerank=template.rerank,
        tried=template.tried,
        predictors=template.predictors,
        left_out=len(left_out.rows) + (0 if len(left_out.replaced) else repeats.get("rows", 0)),
        standing=left_out.standing,
        seconds=time.monotonic() - started,
        job=job.identity,
        replaces=job.live,
        rows=job.source.rows,
        shards=job.shards,
        command=job.command,
    )


def _leave_out(job: MergeJob, attempt: Attempt, progress: Say) -> LeftOut:
    """Find the rows that stand already, and write which they are, which rows they replace, and what is held then."""
    names = TemplatePaths()
    left_out = overlap.find(job.overlap, job.source, job.index, job.base)
    for line in overlap.describe(left_out, job.overlap, job.source.rows):
        progress(line)
    if len(left_out.rows):
        attempt.write(names.standing, lambda file: np.save(file, left_out.rows))
    if job.base and len(left_out.replaced):
        ids = np.union1d(left_out.replaced, replaced_ids(job.index, job.base))
        attempt.write(names.replaced, lambda file: np.save(file, ids))
    for number, source in enumerate(job.source.sources):
        slices = held.slices_of(source)
        attempt.write(names.held(number), lambda file, slices=slices: held.write(slices, file))  # type: ignore[misc]
    return left_out


def base_template(index: Store, base: Manifest) -> tuple[dict[str, Any], Files]:
    """The record of the training that a version's shards are copies of, and its files. CorruptError: it is damaged."""
    paths = VersionPaths(base.template)
    record = kept.read_record(index, paths.template_record)
    return record, kept.template_files(paths, record)


def _modalities(job: MergeJob, filled: Mapping[str, list[int]]) -> list[str]:
    """The modalities to index, those of the version that is added to; `filled` has the kinds of vectors of OUT."""
    modalities: list[str] = [name for name in job.config.modalities if name in filled]
    modalities = list(job.base.key) if job.base else modalities
    if not modalities:
        raise ConfigError(f"{job.source.urls} has no vectors of {', '.join(job.config.modalities)} to index")
    if filled and not {*modalities} & {*job.source.kinds}:
        raise ConfigError(f"{job.source.urls} has no {' or '.join(modalities)} vectors, which the index has")
    return modalities


def _write_queries(attempt: Attempt, queries: Queries) -> None:
    arrays: dict[str, Any] = {}
    for kind, (rows, vectors) in queries.items():
        arrays.update({f"{kind}.rows": rows, f"{kind}.vectors": vectors})
    attempt.write(TemplatePaths().queries, lambda file: np.savez(file, **arrays))


def _sample_rows(job: MergeJob, choices: Sequence[Choice]) -> int:
    """The number of rows to train on; ConfigError if max_memory has no room for `train_rows`."""
    room = (parse_bytes(job.config.max_memory) - job.task_bytes) // (TRAIN_BYTES * job.source.dim)
    if job.config.train_rows > room:
        raise ConfigError(f"--max-memory {job.config.max_memory} has room for {max(room, 0):,} --train-rows")
    lists = max(index_keys.lists(choice.key) for choice in choices)
    return job.config.train_rows or max(1, min(room, max(LEAST_SAMPLE, 64 * lists)))


def _train(
    template: Template,
    attempt: Attempt,
    modalities: Sequence[str],
    filled: Mapping[str, list[int]],
    queries: Queries,
    held_out: Ids,
    progress: Say,
) -> Template:
    """Choose the key of each modality, and write its trained index and predictors; returns the template with them.

    All modalities are re-ranked alike, by the most that one of them wants. Nothing is learned from rows `held_out`.
    """
    job, seed, names = template.job, template.job.config.seed, TemplatePaths()
    asked = {kind: npy.unit(vectors) for kind, (_, vectors) in queries.items()}
    keys, rerank, tried = dict[str, str](), 0, dict[str, list[dict[str, Any]]]()
    predictors: dict[str, dict[str, dict[str, StoredFile]]] = {}
    small = _too_small(job, modalities, filled, queries)
    for modality in modalities:
        counts = filled[modality]
        choices = job.choices(sum(counts), len(modalities))
        if modality in small:
            progress(f"{modality}: {sum(counts):,} rows are too few for index key {choices[0].key}: Flat instead")
            choices = [Choice("Flat", choices[0].rerank)]
        sample = _sample(job, modality, counts, queries, held_out, choices)
        if job.is_tried(choices):
            index, choice, trials = choose(
                choices, sample, asked, sum(counts), job.config.recall_target, seed, progress
            )
            tried[modality] = [asdict(trial) for trial in trials]
        else:
            choice = choices[0]
            index = faiss_index.train(choice.key, sample, seed)
        keys[modality], rerank = choice.key, max(rerank, choice.rerank or 0)
        progress(f"{modality}: key {choice.key}, trained on {len(sample):,} rows")
        attempt.write(names.index(modality), lambda file, index=index: faiss_index.write(index, file.name))  # type: ignore[misc]
        others = partial(_others, job, filled, held_out)
        predictors[modality] = {}
        for kind, predictor in predict.learn(index, modality, sum(counts), sample, list(filled), others, seed).items():
            name = names.predictor(modality, kind)
            attempt.write(name, lambda file, array=predictor.array: np.save(file, array))  # type: ignore[misc]
            predictors[modality][kind] = {f"{attempt.folder}/{name}": attempt.files[name]}
        if modality == _order_modality(modalities) and not faiss_index.has_lists(index):
            count = max(1, min(math.isqrt(job.source.rows), MOST_ORDER_LISTS, len(sample)))
            centroids = clusters.train(sample, count, seed)
            attempt.write(names.centroids, lambda file, centroids=centroids: np.save(file, centroids))  # type: ignore[misc]
    files = {f"{attempt.folder}/{name}": file for name, file in attempt.files.items()}
    return replace(template, keys=keys, rerank=rerank, tried=tried, predictors=predictors, files=files)


def _too_small(
    job: MergeJob, modalities: Sequence[str], filled: Mapping[str, list[int]], queries: Queries
) -> list[str]:
    """The modalities with too few rows for the index key that is given, unless all have."""
    least = index_keys.least_rows(job.config.index_key)
    small = [each for each in modalities if sum(filled[each]) - len(queries[each][0]) < least]
    return small if len(small) < len(modalities) else []


def _others(job: MergeJob, filled: Mapping[str, list[int]], held_out: Ids, kind: str, count: int) -> Vectors:
    """Unit vectors (count, d) of a kind to learn a predictor from, none of them a query."""
    return npy.unit(job.source.draw(kind, filled[kind], count, job.config.seed, held_out)[1])


def _order_modality(modalities: Iterable[str]) -> str:
    return "image" if "image" in modalities else next(iter(modalities))


def _sample(
    job: MergeJob, modality: str, filled: list[int], queries: Queries, held_out: Ids, choices: Sequence[Choice]
) -> Vectors:
    """The unit vectors to train on, in a random order: drawn from all partitions, no query among them."""
    count, seed = _sample_rows(job, choices), job.config.seed
    _, sample = job.source.draw(modality, filled, count, seed, held_out)
    sample = sample if len(sample) else queries[modality][1]  # so few rows that every one is a query
    return npy.unit(sample[np.random.default_rng(seed).permutation(len(sample))])


def _find_duplicates(template: Template, attempt: Attempt, left_out: LeftOut, progress: Say) -> DuplicateRows:
    """Write which rows are left out besides those that stand already, and the report on them."""
    job, names, kind = template.job, TemplatePaths(), template.order_modality
    source, threshold, live = job.source, job.config.dedup, _live_rows(job, kind, left_out.replaced)
    standing, unknown, pieces = left_out.rows, 0, list[Duplicates]()
    if live:
        of_live, unknown = live_duplicates.find(source, live, threshold, standing, progress)
        pieces.append(of_live)
    without = np.union1d(standing, pieces[0].rows) if pieces else standing
    assign = _one_list if source.rows <= FEW_ROWS else template.assigner(duplicates.VISITS)
    pieces.append(duplicates.find(source, kind, assign, threshold, progress, without=without))
    repeats = duplicates.concatenated(pieces)
    share = duplicate_share.measure(source, kind, repeats, threshold, standing, live, job.config.seed)
    attempt.write(names.dropped, lambda file: np.save(file, repeats.rows))
    describe, removed = (live.describe, live.removed) if live else (None, None)
    attempt.write(
        names.duplicates,
        lambda file: duplicate_report.write(repeats, source, threshold, file.name, describe, removed),
    )
    progress(f"{len(repeats.rows):,} of {source.rows:,} rows repeat another one and are left out")
    summary: DuplicateRows = {"rows": len(repeats.rows), "threshold": threshold}
    if live and removed is not None:
        of_removed = int(np.count_nonzero(contains(removed, repeats.kept[repeats.live])))
        summary |= {"live": int(repeats.live.sum()), "removed": of_removed, "unknown": unknown}
        also = f", {of_removed:,} of them removed ones" if of_removed else ""
        progress(f"{summary['live']:,} of them repeat rows of index version {live.base.version}{also}")
        if unknown:
            why = "their vectors are neither in the index nor in their OUT"
            progress(f"{unknown:,} rows could not be compared with some rows of the index: {why}")
    summary |= {"sample": share.sample, "pairs": share.pairs, "found": share.found}
    if share.share is not None:
        progress(
            f"{share.share:.1%} of the duplicates are found, {share.found:,} of {share.pairs:,}, "
            f"by exact search for a sample of {share.sample:,} rows"
        )
    return summary


def _live_rows(job: MergeJob, kind: str, newly_replaced: Ids) -> LiveRows | None:
    """The rows of the version that is added to; None without one, or if it has no vectors of the kind."""
    if not job.base or not job.base.rows:
        return None
    replaced = np.union1d(newly_replaced, replaced_ids(job.index, job.base))
    removed = removed_ids(job.index, job.base, fetch_metadata(job.index, job.base))
    return LiveRows(job.index, job.base, kind, np.setdiff1d(removed, replaced), replaced)


def _one_list(vectors: Vectors) -> Ids:
    """One list for all vectors (n, d), so that each is compared with all others."""
    return np.zeros((len(vectors), 1), dtype=np.int64)
