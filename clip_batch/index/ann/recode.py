"""Codes of 8 bits in place of fast-scan codes: faiss can decode them, and they need no exact re-ranking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clip_batch.index.ann.index_keys import MOST_FLAT_LISTS
from clip_batch.index.ann.libfaiss import Index, load, make
from clip_batch.storage.npy import unit

if TYPE_CHECKING:
    from clip_batch.index.ann.libfaiss import Ids, Vectors
    from clip_batch.index.ann.rerank import RowSource

TRAINED = 50_000
"""Vectors that show which range of values each dimension has."""

BLOCK = 16_384
"""Vectors read at a time."""


def recode(parts: Sequence[tuple[Index, int]], rows: int, removed: Ids, stored: RowSource) -> Index:
    """An index with the lists of `parts`, copies of one template, and 8-bit codes of the `rows` vectors of `stored`.

    Each part comes with the offset of its ids. A row stays in its list, and the centroids are the template's, turned
    back by its transforms (a rotation, a PCA), which the new index has not. The sorted ids `removed` are left out.
    Memory: the new index, and 20 bytes a row.
    """
    lists = _lists_by_row(parts, rows)
    lists[removed] = -1
    whole = _empty(parts[0][0])
    present = np.flatnonzero(lists >= 0)
    sample = np.sort(np.random.default_rng(0).permutation(present)[:TRAINED])
    whole.train(unit(stored[sample]))
    _reserve(whole, np.bincount(lists[present], minlength=whole.nlist))
    pointer = load().swig_ptr
    for low in range(0, len(present), BLOCK):
        ids = present[low : low + BLOCK]
        vectors, theirs = unit(stored[ids]), lists[ids].astype(np.int64)
        whole.add_core(len(ids), pointer(vectors), pointer(ids), pointer(theirs))
    return whole


def _lists_by_row(parts: Sequence[tuple[Index, int]], rows: int) -> npt.NDArray[np.int32]:
    """The list (rows,) of each row; -1 where it is in none."""
    faiss = load()
    lists = np.full(rows, -1, dtype=np.int32)
    for part, offset in parts:
        inverted = faiss.extract_index_ivf(part).invlists
        for number in range(inverted.nlist):
            if size := inverted.list_size(number):
                lists[faiss.rev_swig_ptr(inverted.get_ids(number), size) + offset] = number
    return lists


def _empty(template: Index) -> Index:
    """An untrained index of 8-bit codes that has the centroids of another, for vectors as they are."""
    faiss = load()
    ivf = faiss.extract_index_ivf(template)
    centroids: Vectors = ivf.quantizer.reconstruct_n(0, ivf.nlist)
    within = faiss.downcast_index(template)
    if isinstance(within, faiss.IndexPreTransform):
        for number in reversed(range(within.chain.size())):
            centroids = within.chain.at(number).reverse_transform(centroids)
    graph = "_HNSW32" if ivf.nlist > MOST_FLAT_LISTS else ""
    whole = make(f"IVF{ivf.nlist}{graph},SQ8", template.d)
    whole.quantizer.add(centroids)
    return whole


def _reserve(index: Index, sizes: Ids) -> None:
    """Give each list the room for so many vectors at once: lists that grow by themselves take up to twice the room."""
    for number in np.flatnonzero(sizes).tolist():
        index.invlists.resize(number, int(sizes[number]))
        index.invlists.resize(number, 0)
