"""Held-out queries: vectors of OUT that recall is measured with, and that no index is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from clip_batch.config import MergeConfig
from clip_batch.embeddings.outputs import Outputs
from clip_batch.storage.npy import Half

Ids = npt.NDArray[np.int64]
Queries = dict[str, tuple[Ids, Half]]
"""By kind: which rows (q,) of OUT the queries are, and their vectors (q, d)."""


def filled_rows(source: Outputs, captioned: Sequence[int], without: Ids | None = None) -> dict[str, list[int]]:
    """How many rows of each part have a vector, by kind, except those in `without`, and without kinds that have none.

    `captioned` counts each part's rows with a caption, `without` (n,) is sorted.
    """
    counts = {"image": [commit.rows for commit in source.commits], "text": list(captioned)}
    if without is not None and len(without):
        at = 0
        for each, first in zip(source.sources, source.starts, strict=False):
            for commit, start in zip(each.commits, each.starts, strict=False):
                low = first + start
                lacking = without[slice(*np.searchsorted(without, [low, low + commit.rows]))] - low
                counts["image"][at] -= len(lacking)
                if len(lacking):
                    captionless = source.read_captionless(low, low + commit.rows)
                    counts["text"][at] -= int(np.count_nonzero(~captionless[lacking]))
                at += 1
    filled = {
        kind: [count if has else 0 for count, has in zip(counts[kind], source.having(kind), strict=True)]
        for kind in source.kinds
    }
    return {kind: of_parts for kind, of_parts in filled.items() if sum(of_parts)}


def draw_queries(
    source: Outputs, filled: Mapping[str, list[int]], config: MergeConfig, without: Ids | None = None
) -> Queries:
    """A random sample of each kind: `config.queries` rows, or a tenth of the rows where these are fewer.

    `filled` is of `filled_rows`. CorruptError where a drawn row is not finite and of unit norm.
    """
    queries = {}
    for kind, counts in filled.items():
        count = min(config.queries, max(1, sum(counts) // 10))
        queries[kind] = source.draw(kind, counts, count, config.seed, without)
    return queries


def held_out_rows(queries: Queries, without: Ids | None = None) -> Ids:
    """The sorted rows of OUT that are queries, or in `without`."""
    left_out = [] if without is None else [without]
    rows: Ids = np.unique(np.concatenate([*left_out, *(rows for rows, _ in queries.values())]))
    return rows
