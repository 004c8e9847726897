"""Makes one faiss index of several shards' indices, for systems that cannot search shards.

Indices with inverted lists are joined list by list, their codes unchanged; only fast-scan codes, which faiss cannot
decode, are made anew (see `recode`). Other indices are filled anew with the vectors that they store, which for exact
kinds (Flat, HNSW, RFlat) are the vectors that were added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from clip_batch.errors import ConfigError
from clip_batch.index.ann.faiss_index import write
from clip_batch.index.ann.faiss_search import REFINE_FACTOR
from clip_batch.index.ann.libfaiss import Index, inner, innermost, load
from clip_batch.index.ann.recode import recode

if TYPE_CHECKING:
    from clip_batch.index.ann.libfaiss import Ids
    from clip_batch.index.ann.rows import Stacked

    Part = tuple[Index, int]

BLOCK = 16_384
"""Vectors read back at a time."""


def concatenate(
    parts: Sequence[Part], removed: Ids, effort: int | None, path: str, stored: Stacked | None = None
) -> None:
    """Write the indices of `parts`, each with the offset of its ids, as one plain faiss file.

    An id is its id in the part plus the offset; the sorted ids `removed` are left out. `effort` (nprobe or efSearch) is
    stored in the file, for readers that set none. The parts may be memory-mapped, and cannot be used afterwards.
    `stored` are the exact vectors of all ids, if they are there: where the parts have fast-scan codes, whose vectors
    faiss cannot look up by their place in a list as clip-retrieval does, they get codes of 8 bits. Memory: the whole
    index, unless there is only one part and nothing to leave out; with new codes always, and 20 bytes a row.
    ConfigError: fast-scan codes without exact vectors.
    """
    faiss, first = load(), parts[0][0]
    by_lists = isinstance(_codes(first), faiss.IndexIVF)
    lists = faiss.downcast_InvertedLists(_codes(first).invlists) if by_lists else None
    if isinstance(lists, faiss.BlockInvertedLists):
        if stored is None:
            raise ConfigError(
                "an index of fast-scan codes without exact vectors cannot be exported: clip-retrieval reads every "
                "hit's vector back, and faiss cannot decode them; merge with --rerank 10, or another --index-key"
            )
        whole = recode(parts, len(stored), removed, stored)
    elif len(parts) == 1 and not len(removed) and not isinstance(lists, faiss.OnDiskInvertedLists):
        whole = first
    else:
        whole = _by_lists(parts, removed) if by_lists else _anew(parts, removed)
    _store_effort(whole, effort)
    write(whole, path)


def _codes(index: Index) -> Index:
    """The index inside id maps and transforms; a re-ranking index is not unwrapped, for it has the exact vectors."""
    faiss = load()
    while not isinstance(index := faiss.downcast_index(index), faiss.IndexRefine):
        if (within := inner(index)) is None:
            break
        index = within
    return index


def _copy(index: Index) -> Index:
    """A copy that can be changed; faiss's clone of a mapped index cannot, and it does not clone some transforms."""
    return load().deserialize_index(load().serialize_index(index))


def _by_lists(parts: Sequence[Part], removed: Ids) -> Index:
    faiss = load()
    source = _codes(parts[0][0])
    filled, none = source.invlists, faiss.ArrayInvertedLists(source.nlist, source.code_size)
    source.invlists = none  # so that only centroids and tables are copied; without any lists faiss prints a warning
    whole = _copy(parts[0][0])
    source.invlists = filled
    ivf = _codes(whole)
    lists, total = ivf.invlists, 0
    for part, offset in parts:
        theirs = _codes(part).invlists
        for number in range(ivf.nlist):
            if not (size := theirs.list_size(number)):
                continue
            ids = faiss.rev_swig_ptr(theirs.get_ids(number), size) + offset
            codes = faiss.rev_swig_ptr(theirs.get_codes(number), size * ivf.code_size).reshape(size, -1)
            if (dropped := np.isin(ids, removed)).any():
                ids, codes = ids[~dropped], codes[~dropped]
            if len(ids):
                lists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
                total += len(ids)
    within: Index | None = whole
    while within is not None:  # each wrapper has its own ntotal
        within.ntotal = total
        within = inner(within)
    return whole


def _anew(parts: Sequence[Part], removed: Ids) -> Index:
    faiss = load()
    opened = [_numbered(part, offset) for part, offset in parts]
    whole = _copy(opened[0][0])
    whole.reset()
    all_ids = np.concatenate([ids for _, ids in opened])
    gaps = bool(len(removed)) or not np.array_equal(all_ids, np.arange(len(all_ids)))
    if gaps:
        whole = faiss.IndexIDMap2(whole)
    for index, ids in opened:
        for low in range(0, len(ids), BLOCK):
            numbers = ids[low : low + BLOCK]
            vectors = index.reconstruct_n(low, len(numbers))
            if gaps:
                kept = ~np.isin(numbers, removed)
                whole.add_with_ids(vectors[kept], numbers[kept])
            else:
                whole.add(vectors)
    return whole


def _numbered(index: Index, offset: int) -> tuple[Index, Ids]:
    """The index inside an id map, and the ids (n,) of its vectors in their order."""
    faiss = load()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap):
        return faiss.downcast_index(index.index), faiss.vector_to_array(index.id_map) + offset
    return index, np.arange(index.ntotal) + offset


def _store_effort(index: Index, effort: int | None) -> None:
    faiss = load()
    codes, refined = innermost(index), _codes(index)
    if isinstance(refined, faiss.IndexRefine):
        refined.k_factor = REFINE_FACTOR
    if effort is not None and isinstance(codes, faiss.IndexIVF):
        codes.nprobe = min(effort, codes.nlist)
    elif effort is not None and isinstance(codes, faiss.IndexHNSW):
        codes.hnsw.efSearch = effort
