"""The search effort of a version: the least that reaches the recall wanted, by the recall trials of all shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from shlex import quote
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from clip_batch.index.ann import faiss_index, predictor, recall
from clip_batch.index.ann.predictor import Predictor
from clip_batch.index.ann.recall import Recall, RecallTrial
from clip_batch.index.manifest import DRIFT, Prediction
from clip_batch.index.merge import predict
from clip_batch.index.merge.job import MergeJob
from clip_batch.index.merge.queries import Queries
from clip_batch.index.merge.train import REFERENCE, Template
from clip_batch.index.merge.trial import PREDICTED
from clip_batch.index.paths import VersionPaths
from clip_batch.storage import npy

ROWS: tuple[Literal["rows"], Literal["distance_rows"]] = "rows", "distance_rows"

Say = Callable[[str], None]


class Tuning(NamedTuple):
    """By modality: the efforts, their recall, and the drift of an OUT that is added (see `Manifest`)."""

    effort: dict[str, int | None]
    efforts: dict[str, dict[str, dict[str, int]]]
    recall: dict[str, dict[str, Recall]]
    drift: dict[str, dict[str, float]]
    predicted: dict[str, dict[str, Prediction]]


class _Way(NamedTuple):
    """The trials, by kind, of one way to choose lists at some efforts ([]: there is nothing to tune).

    `places` has, by the kind's own name, the positions of the least efforts that reach the target at each of `DEPTHS`,
    and `missed` the kinds and depths that none reaches.
    """

    efforts: list[int]
    trials: dict[str, RecallTrial]
    places: dict[str, tuple[int, ...]]
    missed: set[tuple[str, int]]


def tune(template: Template, progress: Say) -> Tuning:
    """Choose the efforts of each modality by the shards' trials; see `Tuning`."""
    tuning = Tuning({}, {}, {}, {}, {})
    job, queries = template.job, template.queries()
    for modality in template.keys:
        efforts = faiss_index.efforts(template.index(modality))
        near = _way(template, modality, efforts, list(queries))
        tuning.effort[modality] = efforts[max(max(by_k) for by_k in near.places.values())] if efforts else None
        if efforts:
            tuning.efforts[modality] = {kind: _by_depth(efforts, by_k) for kind, by_k in near.places.items()}
        predictors = template.read_predictors(modality)
        own_efforts = next((predictor.efforts(len(each.bias)) for each in predictors.values()), [])
        kinds = [kind for kind in queries if _own(kind) in predictors]
        predicted = _way(template, modality, own_efforts, kinds, PREDICTED)
        tuning.predicted[modality] = _predictions(template, modality, queries, predictors, predicted, tuning, progress)
        used = {kind for kind, prediction in tuning.predicted[modality].items() if prediction["used"]}
        tuning.recall[modality] = {}
        for kind in near.trials:
            own = _own(kind)
            way = predicted if own in used else near
            trial, places = way.trials[kind], way.places[own]
            numbers = [_number(trial, place) for place in places]
            if _is_whole(job, kind) and (summary := recall.summary(trial, numbers, template.rerank)):
                tuning.recall[modality][own] = summary
                for k, place in zip(recall.DEPTHS, places, strict=True):
                    at = f" at effort {way.efforts[place]}" if efforts else ""
                    at += " of predicted lists" if own in used else ""
                    at += (
                        f", by {len(trial.exact)} {'query' if len(trial.exact) == 1 else 'queries'} only"
                        if _is_few(trial)
                        else ""
                    )
                    shown = f"recall@{k} {summary[str(k)]:.3f} +- {summary[f'interval_{k}']:.3f}"  # type: ignore[literal-required]
                    progress(f"{modality}: {own} queries: {shown}{at}")
        if near.missed:
            remedy = f", --rerank {template.rerank} may be too little" if template.rerank else ""
            missed = " and ".join(sorted(f"{k} of {own} queries" for own, k in near.missed))
            target = f"a recall of {job.config.recall_target} at {missed}"
            progress(f"{modality}: no effort reaches {target}: the largest that gained is recorded{remedy}")
        if job.base:
            tuning.drift[modality] = _drift(template, modality, near, progress)
    return tuning


def _own(kind: str) -> str:
    """The kind of queries itself, "image" or "text"."""
    return kind.removeprefix(REFERENCE)


def _by_depth(efforts: Sequence[int], places: Sequence[int]) -> dict[str, int]:
    """The efforts at some positions, one for each of `DEPTHS`, by the depth."""
    return {str(k): efforts[place] for k, place in zip(recall.DEPTHS, places, strict=True)}


def _predictions(
    template: Template,
    modality: str,
    queries: Queries,
    predictors: Mapping[str, Predictor],
    predicted: _Way,
    tuning: Tuning,
    progress: Say,
) -> dict[str, Prediction]:
    """How predicted lists compare with those of the nearest centroids, by kind of query."""
    if not predicted.trials:
        return {}
    index, predictions = template.index(modality), dict[str, Prediction]()
    list_sizes = _list_sizes(template, modality)
    for kind, places in predicted.places.items():
        vectors = queries[REFERENCE + kind if REFERENCE + kind in queries else kind][1]
        predictions[kind] = prediction = predict.compare(
            index,
            list_sizes,
            npy.unit(vectors),
            predictors[kind],
            _by_depth(predicted.efforts, places),
            tuning.efforts[modality][kind],
            reached=len(vectors) >= recall.FEW and all(missed != kind for missed, _ in predicted.missed),
            file=template.predictors[modality][kind],
        )
        rows, others = (" and ".join(f"{each:,.0f}" for each in prediction[name].values()) for name in ROWS)
        verdict = "predicted" if prediction["used"] else "nearest"
        progress(f"{modality}: {kind} queries score {rows} rows in predicted lists, {others} in the nearest: {verdict}")
    return predictions


def _times(job: MergeJob) -> int:
    """How many times as many shards the version has as are new: hits are spread over all of them."""
    return (len(job.base.shards) + job.shards) // job.shards if job.base else 1


def _way(template: Template, modality: str, efforts: list[int], kinds: Sequence[str], prefix: str = "") -> _Way:
    """The trials of some kinds, whose names in the shards' files have a prefix; see `_Way`.

    A trial is over one of so many parts of the rows: its share of the hits is what must be found.
    """
    job = template.job
    way = _Way(efforts, {}, {}, set())
    for kind in kinds:
        own, found = _own(kind), []
        way.trials[kind] = trial = _fold(template, modality, kind, prefix)
        parts = 1 if _is_whole(job, kind) else _times(job)
        for k in recall.DEPTHS:
            number, reached = recall.least_effort(trial, job.config.recall_target, k, template.rerank, parts)
            found.append(int(trial.places[number]))
            if not reached:
                way.missed.add((own, k))
        way.places[own] = tuple(max(pair) for pair in zip(found, way.places.get(own, found), strict=True))
    few = {_own(kind) for kind, trial in way.trials.items() if _is_few(trial)}
    enough = [places for own, places in way.places.items() if own not in few]
    for own in few if enough else ():
        way.places[own] = tuple(map(max, *enough, way.places[own]))
    return way


def _is_few(trial: RecallTrial) -> bool:
    """Whether a trial has too few queries to tune by: the effort of its kind is not less than another's then."""
    return len(trial.exact) < recall.FEW


def _number(trial: RecallTrial, place: int) -> int:
    """Which of the efforts that a trial tried stands for the effort at a position: the nearest that is not larger."""
    return max(0, int(np.searchsorted(trial.places, place, "right")) - 1)


def _drift(template: Template, modality: str, near: _Way, progress: Say) -> dict[str, float]:
    """The recall@10 of the new rows' own queries, by kind, at the effort of the version that they are added to.

    That is by the lists of the nearest centroids: prediction spends less where the new rows lie otherwise.
    """
    base = template.job.base
    assert base is not None
    drift = {}
    for kind, trial in near.trials.items():
        if _is_whole(template.job, kind):
            continue
        effort = base.effort_for(modality, 10, kind)
        place = near.efforts.index(effort) if effort in near.efforts else 0
        if (value := recall.recall(trial, _number(trial, place), 10, template.rerank)) is None:
            continue
        drift[kind] = value
        known = base.recall[modality].get(kind)
        before = known["10"] if known else 0.0
        progress(f"{modality}: {kind} queries of the new rows find {value:.3f} of them, {before:.3f} before")
        if value < before - DRIFT:
            command = f"clip-batch merge --anew --index {quote(template.job.index.url)}"
            progress(f"{modality}: the new rows do not fit the trained lists: {command} retrains over all OUTs")
    return drift


def _is_whole(job: MergeJob, kind: str) -> bool:
    """Whether a trial of that kind is over all rows of the version."""
    return not job.base or kind.startswith(REFERENCE)


def _fold(template: Template, modality: str, kind: str, prefix: str) -> RecallTrial:
    """The trial over all shards whose rows these queries were tried on; one shard is in memory at a time."""
    job = template.job
    whole: RecallTrial | None = None
    for paths, name in _truths(job, with_base=_is_whole(job, kind)):
        own = _own(kind) if job.base and paths.folder == job.base.template else kind
        with template.fetch(paths.truth(name)) as path, np.load(path) as arrays:
            trial = recall.load(arrays, f"{modality}.{prefix}{own}")
        whole = recall.fold(whole, trial) if whole else trial
    assert whole is not None
    return whole


def _list_sizes(template: Template, modality: str) -> npt.NDArray[np.int64]:
    """The number of rows in each inverted list (lists,), of all shards together."""
    sizes = []
    for paths, name in _truths(template.job, with_base=True):
        with template.fetch(paths.truth(name)) as path, np.load(path) as arrays:
            sizes.append(arrays[predict.sizes(modality)])
    total: npt.NDArray[np.int64] = np.sum(sizes, axis=0)
    return total


def _truths(job: MergeJob, with_base: bool) -> list[tuple[VersionPaths, str]]:
    """The versions and names of the shards whose trials count: the new ones, and those that they are added to."""
    shards = [(job.paths, job.shard_name(shard)) for shard in range(job.shards)]
    if job.base and with_base:
        shards += [(job.base.paths(shard), shard.name) for shard in job.base.shards]
    return shards
