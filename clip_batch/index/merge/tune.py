"""The search effort of a version: the least that reaches the recall wanted, by the recall trials of all shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clip_batch.index.ann import faiss_index, recall
from clip_batch.index.ann.recall import Recall, RecallTrial
from clip_batch.index.manifest import Manifest
from clip_batch.index.merge.job import MergeJob
from clip_batch.index.merge.train import REFERENCE, Template

DRIFT = 0.02
"""How much less recall@10 the rows added to an index may have before retraining is advised."""

Say = Callable[[str], None]


class Tuning(NamedTuple):
    """By modality: the effort, its recall, and the drift of an OUT that is added (see `Manifest`)."""

    effort: dict[str, int | None]
    recall: dict[str, dict[str, Recall]]
    drift: dict[str, dict[str, float]]


def tune(template: Template, progress: Say) -> Tuning:
    """Choose the effort of each modality by the shards' trials; see `Tuning`."""
    tuning = Tuning({}, {}, {})
    job, kinds = template.job, list(template.queries())
    for modality in template.keys:
        trials = {kind: _fold(job, modality, kind) for kind in kinds}
        whole = {kind.removeprefix(REFERENCE): trial for kind, trial in trials.items() if _is_whole(job, kind)}
        efforts = faiss_index.efforts(template.index(modality))
        place, reached = recall.least_effort(list(trials.values()), job.config.recall_target)
        tuning.effort[modality] = efforts[place] if efforts else None
        summaries = {kind: summary for kind, trial in whole.items() if (summary := recall.summary(trial, place))}
        tuning.recall[modality] = summaries
        shown = ", ".join(f"{kind} queries {summary['10']:.3f}" for kind, summary in summaries.items())
        progress(f"{modality}: recall@10 {shown or 'not measurable'} at effort {tuning.effort[modality]}")
        if not reached:
            remedy = f", --rerank {job.rerank} may be too little" if job.rerank else ""
            target = f"recall@10 of {job.config.recall_target}"
            progress(f"{modality}: no effort reaches {target}: the largest that gained is recorded{remedy}")
        if job.base:
            added = {kind: trial for kind, trial in trials.items() if not _is_whole(job, kind)}
            tuning.drift[modality] = _drift(job.base, modality, efforts, added, progress)
    return tuning


def _drift(
    base: Manifest, modality: str, efforts: list[int], trials: dict[str, RecallTrial], progress: Say
) -> dict[str, float]:
    """The recall@10 of the new rows' own queries, by kind, at the effort of the version that they are added to."""
    effort = base.effort[modality]
    place = efforts.index(effort) if effort in efforts else 0
    values = {kind: recall.recall(trial, place, 10) for kind, trial in trials.items()}
    drift = {kind: value for kind, value in values.items() if value is not None}
    for kind, value in drift.items():
        known = base.recall[modality].get(kind)
        before = known["10"] if known else 0.0
        progress(f"{modality}: {kind} queries of the new rows find {value:.3f} of them, {before:.3f} before")
        if value < before - DRIFT:
            progress(f"{modality}: the new rows do not fit the trained lists: merge all of OUT anew to retrain")
    return drift


def _is_whole(job: MergeJob, kind: str) -> bool:
    """Whether a trial of that kind is over all rows of the version."""
    return not job.base or kind.startswith(REFERENCE)


def _fold(job: MergeJob, modality: str, kind: str) -> RecallTrial:
    """The trial over all shards whose rows these queries were tried on; one shard is in memory at a time."""
    files = [(job.paths, job.shard_name(shard), kind) for shard in range(job.shards)]
    if job.base and kind.startswith(REFERENCE):
        for shard in job.base.shards:
            paths = job.base.paths(shard)
            own = kind.removeprefix(REFERENCE) if paths.folder == job.base.template else kind
            files.append((paths, shard.name, own))
    whole: RecallTrial | None = None
    for paths, name, own in files:
        with job.index.fetch(paths.truth(name)) as path, np.load(path) as arrays:
            trial = RecallTrial(*(arrays[f"{modality}.{own}.{field}"] for field in ("exact", "ranked", "true")))
        whole = recall.fold(whole, trial) if whole else trial
    assert whole is not None
    return recall.reranked(whole) if job.rerank else whole
