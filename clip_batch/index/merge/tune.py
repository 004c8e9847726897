"""Trials of recall: each shard's task tries the held-out queries on its rows, the manifest task folds and tunes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_batch.embeddings import reader
from clip_batch.index.ann import faiss_index, recall
from clip_batch.index.ann.order import best
from clip_batch.index.ann.rerank import candidates, score
from clip_batch.index.ann.rows import Ordered
from clip_batch.index.merge.job import TRUTH, MergeJob
from clip_batch.index.merge.train import REFERENCE, read_queries, read_template
from clip_batch.storage import npy

SATURATED = 0.99
"""A doubled effort that leaves this share of the scores as they were is not doubled again."""

ENOUGH, FEW = 0.5, -2.0
"""Efforts are tried that bring a shard's recall@10 between these two, as shares of the way from the target to 1."""

DRIFT = 0.02
"""How much less recall@10 the rows added to an index may have before retraining is advised."""

DEPTH = recall.TOP + 1
"""Of the searches: one found may be the query itself."""

Say = Callable[[str], None]
Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
Found = tuple[Vectors, Ids, Vectors]
"""By which scores rows were ranked, the rows, their exact scores; each (q, any)."""


def run(
    made: Any,
    rows: Ordered,
    queries: Mapping[str, tuple[Vectors, Ids]],
    factor: int,
    target: float,
    first: int | None = None,
    shards: int = 1,
) -> dict[str, recall.RecallTrial]:
    """Exact and found neighbours, among the rows of one of `shards`, of the queries of each kind.

    `queries` has vectors (q, d) and which row each is itself, or -1. With a re-ranking `factor` the candidates are
    found: which of them are re-ranked is decided among all shards'. Tried are the efforts about the one that
    brings the recall wanted, `target`, from `first` on (by default from the middle). Lesser ones count
    as if they found nothing, larger ones as if they found no more: no recall is reported too high.
    """
    kinds = list(queries)
    scores, ids = _exact(rows, np.concatenate([queries[kind][0] for kind in kinds]))
    ends = np.cumsum([len(queries[kind][0]) for kind in kinds])[:-1]
    exact = dict(zip(kinds, zip(np.split(scores, ends), np.split(ids, ends), strict=True), strict=True))
    efforts: list[int | None] = [*faiss_index.efforts(made)]
    efforts = efforts or [None]
    start = efforts.index(first) if first in efforts else len(efforts) // 2
    trials = {}
    for kind, (asked, own) in queries.items():
        measure = _measure(own, exact[kind], factor, shards)
        found = _tries(made, rows, asked, efforts, start, factor, measure, target)
        trials[kind] = recall.measure(own, exact[kind], found, candidates(10, factor))
    return trials


def _measure(own: Ids, exact: tuple[Vectors, Ids], factor: int, shards: int) -> Callable[[Found], float]:
    """What gives the recall@10 of what was found; with re-ranking, that of a shard's share of ten and of candidates."""
    k = -(-10 // shards) if factor else 10
    depth = candidates(10, factor) * k // 10

    def reached(found: Found) -> float:
        trial = recall.measure(own, exact, [found], depth)
        return recall.recall(recall.reranked(trial) if factor else trial, 0, k) or 0.0

    return reached


def _tries(
    made: Any,
    rows: Ordered,
    queries: Vectors,
    efforts: list[int | None],
    start: int,
    factor: int,
    measure: Callable[[Found], float],
    target: float,
) -> list[Found]:
    """What is found at each effort."""
    few, enough = (target + share * (1 - target) for share in (FEW, ENOUGH))
    tried: dict[int, Found] = {}

    def attempt(place: int) -> float:
        tried[place] = _search(made, rows, queries, efforts[place], factor)
        return measure(tried[place])

    at, first = start, attempt(start)
    reached = first
    while at > 0 and reached > few:
        at -= 1
        reached = attempt(at)
    at, reached = start, first
    while at < len(efforts) - 1 and reached < enough:
        at += 1
        reached = attempt(at)
        if np.mean(tried[at][0] == tried[at - 1][0]) > SATURATED:
            break
    scores, ids, true = tried[start]
    nothing = np.full_like(scores, -np.inf), np.full_like(ids, -1), np.full_like(true, -np.inf)
    return [nothing if place < min(tried) else tried[min(place, at)] for place in range(len(efforts))]


def _exact(rows: Ordered, queries: Vectors) -> tuple[Vectors, Ids]:
    """Scores and rows (q, any) of exact search."""
    scores, ids = np.empty((len(queries), 0), dtype=np.float32), np.empty((len(queries), 0), dtype=np.int64)
    for block in reader.blocks(len(rows)):
        data = npy.unit(rows[block])
        there = np.flatnonzero(np.any(data != 0, axis=1))
        if not len(there):
            continue
        more, places = faiss_index.nearest(queries, data[there], DEPTH)
        scores, ids = best(np.hstack([scores, more]), np.hstack([ids, block.start + there[places]]), DEPTH)
    return scores, ids


def _search(made: Any, rows: Ordered, queries: Vectors, effort: int | None, factor: int) -> Found:
    """As a Searcher of this index will: recall@10 is what the effort is tuned for."""
    scores, ids = faiss_index.search(made, queries, candidates(10, factor), effort)
    return scores, ids, score(queries, ids, rows)


def tune(job: MergeJob, trained: dict[str, Any], progress: Say) -> tuple[Any, Any, Any]:
    """(effort, recall, drift) by modality; an index that is added to is measured by its own queries again."""
    effort: dict[str, int | None] = {}
    measured: dict[str, dict[str, dict[str, float]]] = {}
    drift: dict[str, dict[str, float]] = {}
    kinds = read_queries(job, trained)
    for modality in trained["keys"]:
        trials = {kind: _fold(job, modality, kind) for kind in kinds}
        whole = {kind.removeprefix(REFERENCE): trial for kind, trial in trials.items() if _is_whole(job, kind)}
        candidates = faiss_index.efforts(read_template(job, trained, modality))
        at, reached = recall.least_effort(list(trials.values()), job.config.recall_target)
        effort[modality] = candidates[at] if candidates else None
        measured[modality] = {kind: line for kind, trial in whole.items() if (line := recall.summary(trial, at))}
        shown = ", ".join(f"{kind} queries {line['10']:.3f}" for kind, line in measured[modality].items())
        progress(f"{modality}: recall@10 {shown or 'not measurable'} at effort {effort[modality]}")
        if not reached:
            mend = f", --rerank {job.rerank} may be too little" if job.rerank else ""
            wanted = f"recall@10 of {job.config.recall_target}"
            progress(f"{modality}: no effort reaches {wanted}: the largest that gained is recorded{mend}")
        if job.base:
            was = job.base.effort[modality]
            then = candidates.index(was) if was in candidates else 0
            new = {kind: recall.recall(trial, then, 10) for kind, trial in trials.items() if not _is_whole(job, kind)}
            drift[modality] = {kind: value for kind, value in new.items() if value is not None}
            for kind, value in drift[modality].items():
                before = job.base.recall[modality].get(kind, {}).get("10", 0.0)
                progress(f"{modality}: {kind} queries of the new rows find {value:.3f} of them, {before:.3f} before")
                if value < before - DRIFT:
                    progress(f"{modality}: the new rows do not fit the trained lists: merge all of OUT anew to retrain")
    return effort, measured, drift


def _is_whole(job: MergeJob, kind: str) -> bool:
    """Whether a trial of that kind is over all rows of the version."""
    return not job.base or kind.startswith(REFERENCE)


def _fold(job: MergeJob, modality: str, kind: str) -> recall.RecallTrial:
    """One trial over all shards that it is over, a shard at a time."""
    files = [(job.version, job.shard_name(shard), kind) for shard in range(job.shards)]
    if job.base and kind.startswith(REFERENCE):
        for shard in job.base.shards:
            version = shard.version or job.base.version
            own = kind.removeprefix(REFERENCE) if version == job.base.template else kind
            files.append((version, shard.name, own))
    whole: recall.RecallTrial | None = None
    for version, name, own in files:
        with job.index.fetch(f"{version}/{TRUTH}/{name}.npz") as path, np.load(path) as saved:
            trial = recall.RecallTrial(*(saved[f"{modality}.{own}.{field}"] for field in ("exact", "ranked", "true")))
        whole = recall.fold(whole, trial) if whole else trial
    assert whole is not None
    return recall.reranked(whole) if job.rerank else whole
