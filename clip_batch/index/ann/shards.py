"""The opened index shards of one modality, searched together; one query that compares little wakes no other thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from clip_batch.index.ann import faiss_index, faiss_search, shared_lists
from clip_batch.index.ann.faiss_search import Excluded, Removed
from clip_batch.index.ann.libfaiss import Index
from clip_batch.index.ann.order import best
from clip_batch.index.ann.shared_lists import SharedLists

if TYPE_CHECKING:
    from clip_batch.index.ann.libfaiss import Ids, Vectors
    from clip_batch.index.ann.predictor import Predictor

QUICK = 2**20
"""Bytes of codes that one thread compares with a query sooner than the work can be handed to several."""

SOON = 2**24
"""Bytes of codes up to which faiss's threads are not woken for one query: other clients need the cores."""


@dataclass(frozen=True)
class OpenedIndex:
    """A faiss index whose ids 0 to rows - 1 are the ids of INDEX from `offset` on."""

    index: Index
    offset: int
    rows: int
    removed: Removed | None = None


@dataclass(frozen=True)
class Shards:
    """The opened indices of a modality, in the order of ids, and what they share (None: nothing)."""

    parts: tuple[OpenedIndex, ...]
    shared: SharedLists | None

    @classmethod
    def of(cls, parts: Sequence[OpenedIndex]) -> Shards:
        """The shards, once it is seen whether they are copies of one template."""
        return cls(tuple(parts), shared_lists.share([part.index for part in parts]))


def search(
    shards: Shards,
    pool: ThreadPoolExecutor,
    queries: Vectors,
    depth: int,
    effort: int | None,
    predictor: Predictor | None = None,
    removed_of: Callable[[OpenedIndex], Excluded | None] = lambda part: part.removed,
) -> tuple[Vectors, Ids]:
    """The `depth` best rows of each query (n, d), as the shards score them: (n, depth), -inf and -1 where are fewer.

    `removed_of` gives the rows of a shard that are no hits. One query that has little to compare, or only one shard, is
    answered in the calling thread.
    """
    parts, shared = shards.parts, shards.shared
    compared = inf if shared is None else shared.probes(effort) * shared.bytes_per_list
    alone = len(queries) == 1 and (len(parts) == 1 or compared <= QUICK)
    probe = None
    if shared is not None and (predictor or (len(parts) > 1 and depth < faiss_search.DEEP)):
        assign = partial(shared_lists.probe, shared, queries, effort, predictor)
        probe = assign() if len(queries) == 1 else pool.submit(assign).result()
        nothing_removed = shared_lists.parameters(probe)

    def search_part(number: int) -> tuple[Vectors, Ids]:
        part = parts[number]
        removed, k = removed_of(part), min(depth, part.rows)
        if shared is None or probe is None:
            return faiss_search.search(part.index, queries, k, effort, removed)
        parameters = nothing_removed if removed is None else shared_lists.parameters(probe, removed)
        return shared_lists.search(shared, number, probe, k, parameters)

    if alone:
        with faiss_index.one_thread() if compared <= SOON else nullcontext():
            hits = [search_part(number) for number in range(len(parts))]
    else:
        hits = list(pool.map(search_part, range(len(parts))))
    found = np.hstack([ids for _, ids in hits])
    offsets = np.repeat([part.offset for part in parts], [ids.shape[1] for _, ids in hits])
    scores, ids = np.hstack([scores for scores, _ in hits]), found + offsets
    scores[found < 0], ids[found < 0] = -np.inf, -1
    # All shards are copies of one template, so their scores can be compared.
    return best(scores, ids, depth)


def search_over(shards: Shards, query: Vectors, threshold: float, effort: int | None) -> Iterator[tuple[Vectors, Ids]]:
    """Yield the scores (n,) and ids (n,), by ascending id, of a shard's rows that score `threshold` or more."""
    for part in shards.parts:
        scores, ids = faiss_search.search_over(part.index, query, threshold, effort, part.removed)
        yield scores, ids + part.offset
