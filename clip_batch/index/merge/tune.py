"""The search effort of a version: the least that reaches the recall wanted, by the recall trials of all shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clip_batch.index.ann import faiss_index, recall
from clip_batch.index.ann.recall import Recall, RecallTrial
from clip_batch.index.merge.job import MergeJob
from clip_batch.index.merge.train import REFERENCE, Template

DRIFT = 0.02
"""How much less recall@10 the rows added to an index may have before retraining is advised."""

Say = Callable[[str], None]


class Tuning(NamedTuple):
    """By modality: the efforts, their recall, and the drift of an OUT that is added (see `Manifest`)."""

    effort: dict[str, int | None]
    efforts: dict[str, dict[str, dict[str, int]]]
    recall: dict[str, dict[str, Recall]]
    drift: dict[str, dict[str, float]]


def tune(template: Template, progress: Say) -> Tuning:
    """Choose the efforts of each modality by the shards' trials; see `Tuning`."""
    tuning = Tuning({}, {}, {}, {})
    job, kinds = template.job, list(template.queries())
    for modality in template.keys:
        trials = {kind: _fold(template, modality, kind) for kind in kinds}
        efforts = faiss_index.efforts(template.index(modality))
        parts = {kind: 1 if _is_whole(job, kind) else _times(job) for kind in trials}
        places, missed = _least_efforts(trials, parts, job.config.recall_target, template.rerank)
        tuning.effort[modality] = efforts[max(max(by_k) for by_k in places.values())] if efforts else None
        if efforts:
            ks = [str(k) for k in recall.DEPTHS]
            tuning.efforts[modality] = {
                kind: {k: efforts[place] for k, place in zip(ks, by_k, strict=True)} for kind, by_k in places.items()
            }
        tuning.recall[modality] = {}
        for kind, trial in trials.items():
            own = kind.removeprefix(REFERENCE)
            numbers = [_number(trial, place) for place in places[own]]
            if _is_whole(job, kind) and (summary := recall.summary(trial, numbers, template.rerank)):
                tuning.recall[modality][own] = summary
                by_k = tuning.efforts[modality][own] if efforts else {}
                for k in recall.DEPTHS:
                    at = f" at effort {by_k[str(k)]}" if by_k else ""
                    shown = f"recall@{k} {summary[str(k)]:.3f} +- {summary[f'interval_{k}']:.3f}"  # type: ignore[literal-required]
                    progress(f"{modality}: {own} queries: {shown}{at}")
        if missed:
            remedy = f", --rerank {template.rerank} may be too little" if template.rerank else ""
            target = f"a recall of {job.config.recall_target} at {' and '.join(missed)}"
            progress(f"{modality}: no effort reaches {target}: the largest that gained is recorded{remedy}")
        if job.base:
            added = {kind: trial for kind, trial in trials.items() if not _is_whole(job, kind)}
            tuning.drift[modality] = _drift(template, modality, efforts, added, progress)
    return tuning


def _times(job: MergeJob) -> int:
    """How many times as many shards the version has as are new: hits are spread over all of them."""
    return (len(job.base.shards) + job.shards) // job.shards if job.base else 1


def _least_efforts(
    trials: dict[str, RecallTrial], parts: dict[str, int], target: float, factor: int
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """By kind, the positions of the least efforts that reach the target at each of `DEPTHS`; and which miss it.

    A trial is over one of so many `parts` of the rows: its share of the hits is what must be found.
    """
    places: dict[str, tuple[int, ...]] = {}
    missed = []
    for kind, trial in trials.items():
        own, found = kind.removeprefix(REFERENCE), []
        for k in recall.DEPTHS:
            number, reached = recall.least_effort(trial, target, k, factor, parts[kind])
            found.append(int(trial.places[number]))
            missed += [] if reached else [f"{k} of {own} queries"]
        places[own] = tuple(max(pair) for pair in zip(found, places.get(own, found), strict=True))
    return places, sorted(set(missed))


def _number(trial: RecallTrial, place: int) -> int:
    """Which of the efforts that a trial tried stands for the effort at a position: the nearest that is not larger."""
    return max(0, int(np.searchsorted(trial.places, place, "right")) - 1)


def _drift(
    template: Template, modality: str, efforts: list[int], trials: dict[str, RecallTrial], progress: Say
) -> dict[str, float]:
    """The recall@10 of the new rows' own queries, by kind, at the effort of the version that they are added to."""
    base = template.job.base
    assert base is not None
    drift = {}
    for kind, trial in trials.items():
        effort = base.effort_for(modality, 10, kind)
        place = efforts.index(effort) if effort in efforts else 0
        if (value := recall.recall(trial, _number(trial, place), 10, template.rerank)) is None:
            continue
        drift[kind] = value
        known = base.recall[modality].get(kind)
        before = known["10"] if known else 0.0
        progress(f"{modality}: {kind} queries of the new rows find {value:.3f} of them, {before:.3f} before")
        if value < before - DRIFT:
            progress(f"{modality}: the new rows do not fit the trained lists: merge all of OUT anew to retrain")
    return drift


def _is_whole(job: MergeJob, kind: str) -> bool:
    """Whether a trial of that kind is over all rows of the version."""
    return not job.base or kind.startswith(REFERENCE)


def _fold(template: Template, modality: str, kind: str) -> RecallTrial:
    """The trial over all shards whose rows these queries were tried on; one shard is in memory at a time."""
    job = template.job
    files = [(job.paths, job.shard_name(shard), kind) for shard in range(job.shards)]
    if job.base and kind.startswith(REFERENCE):
        for shard in job.base.shards:
            paths = job.base.paths(shard)
            own = kind.removeprefix(REFERENCE) if paths.folder == job.base.template else kind
            files.append((paths, shard.name, own))
    whole: RecallTrial | None = None
    for paths, name, own in files:
        with job.index.fetch(paths.truth(name)) as path, np.load(path) as arrays:
            trial = recall.load(arrays, f"{modality}.{own}")
        whole = recall.fold(whole, trial) if whole else trial
    assert whole is not None
    return whole
