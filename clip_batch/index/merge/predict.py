"""Predictors of the lists that queries visit: learned with the template, and used where the shards' trials favour them.

They are learned from the rows that the index is trained on, before any shard is filled, so that each shard's trial can
search as searches will.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from clip_batch.index.ann import clusters, faiss_index, faiss_search, footprint, predictor, shared_lists
from clip_batch.index.ann.libfaiss import Index
from clip_batch.index.ann.predictor import Predictor
from clip_batch.index.ann.recall import DEPTHS
from clip_batch.index.manifest import Prediction
from clip_batch.types import StoredFile

FEWEST, MOST = 1_000, 10_000
"""Queries to learn from: none is learned from fewer."""

MULTIPLICATIONS = 2 * 10**11
"""Multiplications that may be spent on comparing queries with training rows to find neighbours: some 4 CPU seconds."""

SCALED = 500
"""Queries that the scale of a predictor for the indexed kind itself is learned from."""

NEIGHBOURS = 30
"""Best rows of each query whose lists are learned; of 10 or 100 less is learned (see docs/experiments.md)."""

WORTH = 2**18
"""Bytes of codes that must be saved in a query: as many are compared in the time that a prediction takes longer."""

LEAST_BYTES = 64 * WORTH
"""Bytes of an index's codes from which predictors are learned: a query compares some twentieth of them at most."""

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def learn(
    index: Index,
    modality: str,
    rows: int,
    sample: Vectors,
    kinds: Sequence[str],
    others: Callable[[str, int], Vectors],
    seed: int,
) -> dict[str, Predictor]:
    """The predictors of a trained index by kind of query; none where they could not be used, or queries are few.

    The index is for so many rows. `sample` is float32 (n, d), the rows that the index of the modality is trained on;
    queries of that kind need no more than the order of the centroids and a scale. `others` gives so many vectors (n, d)
    of another kind to learn from, or fewer.
    """
    shared = shared_lists.share([index])
    if shared is None or len(sample) < FEWEST or shared.inverted[0].nlist > footprint.PREDICTED_LISTS:
        return {}
    if rows * shared.inverted[0].code_size < LEAST_BYTES:
        return {}
    try:
        centroids = shared.centroids
    except RuntimeError:  # a quantizer that gives none back
        return {}
    of_row, vectors = faiss_index.assigner(index)(sample), shared.transformed(sample)
    axes = clusters.axes_of(centroids)
    reduced = vectors if axes is None else vectors @ axes  # what is left hardly changes which rows are near
    most, predictors = min(MOST, MULTIPLICATIONS // reduced.size), dict[str, Predictor]()
    for kind in kinds:
        own = kind == modality
        queries = vectors[:SCALED] if own else shared.transformed(others(kind, most))
        if not own and len(queries) < FEWEST:
            continue
        near = faiss_search.nearest(queries if axes is None else queries @ axes, reduced, NEIGHBOURS + own)[1]
        lists = of_row[near[:, int(own) :]]  # the first is the row itself
        if own:
            predictors[kind] = predictor.scaled(centroids, queries, lists)
        else:
            predictors[kind] = predictor.learned(centroids, queries, lists, seed=seed)
    return predictors


def sizes(modality: str) -> str:
    """The name, in a shard's trials, of the numbers of rows (lists,) in its lists."""
    return f"{modality}.sizes"


def compare(
    index: Index,
    list_sizes: Ids,
    queries: Vectors,
    predictor: Predictor,
    efforts: Mapping[str, int],
    distance_efforts: Mapping[str, int],
    reached: bool,
    file: dict[str, StoredFile],
) -> Prediction:
    """Whether predicted lists serve queries (n, d) better than those of the nearest centroids, at these efforts.

    `index` is the template and `list_sizes` (lists,) are those of all shards. Lists are predicted where the recall is
    `reached` and, at each depth, a query compares `WORTH` bytes of codes less.
    """
    shared = shared_lists.share([index])
    assert shared is not None
    sizes = np.append(list_sizes, 0)  # the last is of -1: no list

    def rows(efforts: Mapping[str, int], predictor: Predictor | None) -> dict[str, float]:
        return {
            k: float(sizes[shared_lists.probe(shared, queries, effort, predictor).lists].sum(axis=1).mean())
            for k, effort in efforts.items()
        }

    ours, theirs = rows(efforts, predictor), rows(distance_efforts, None)
    size = shared.inverted[0].code_size
    used = reached and all((theirs[str(k)] - ours[str(k)]) * size >= WORTH for k in DEPTHS)
    return Prediction(used=used, efforts=dict(efforts), rows=ours, distance_rows=theirs, file=file if used else {})
