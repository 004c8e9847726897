"""Held-out queries: vectors of OUT that recall is measured with, and that no index is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from clip_batch.config import MergeConfig
from clip_batch.embeddings.reader import Embeddings
from clip_batch.plan.paths import VECTORS
from clip_batch.storage.npy import Half

Ids = npt.NDArray[np.int64]
Queries = dict[str, tuple[Ids, Half]]
"""By kind: which rows (q,) of OUT the queries are, and their vectors (q, d)."""


def vector_kinds(source: Embeddings) -> tuple[str, ...]:
    """The kinds of vectors, "image" and "text", that every part of OUT has."""
    return tuple(kind for kind, folder in VECTORS.items() if all(commit.file(folder) for commit in source.commits))


def filled_rows(source: Embeddings, kinds: Sequence[str], captioned: list[int]) -> dict[str, list[int]]:
    """How many rows of each part have a vector, by kind, without kinds that have none.

    `captioned` counts each part's rows with a caption.
    """
    filled = {"image": [commit.rows for commit in source.commits], "text": captioned}
    return {kind: filled[kind] for kind in kinds if sum(filled[kind])}


def draw_queries(source: Embeddings, filled: Mapping[str, list[int]], config: MergeConfig) -> Queries:
    """A random sample of each kind: `config.queries` rows, or a tenth of the rows where these are fewer.

    `filled` is of `filled_rows`. CorruptError where a drawn row is not finite and of unit norm.
    """
    queries = {}
    for kind, counts in filled.items():
        count = min(config.queries, max(1, sum(counts) // 10))
        queries[kind] = source.draw(kind, counts, count, config.seed)
    return queries


def held_out_rows(queries: Queries) -> Ids:
    """The sorted rows of OUT that are queries."""
    rows: Ids = np.unique(np.concatenate([rows for rows, _ in queries.values()]))
    return rows
