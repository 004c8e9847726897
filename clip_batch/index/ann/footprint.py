"""The size of an index before it is built, computed from the untrained index of its index key.

Bytes are those of the index file. Memory takes about 160 bytes more for each inverted list and, behind an id map, a
hash table of the ids. Fast-scan lists are padded to multiples of 32 rows, which is not counted.
"""

from __future__ import annotations

import math
from typing import Any

from clip_batch.index.ann.libfaiss import Index, innermost, load, make

ID = 8
"""Bytes of a stored id."""

LIST = 160
"""Memory of an inverted list, empty or not, besides its bytes in a file."""


PREDICTED_LISTS = 32_768
"""Lists of an index up to which predictors are learned: every query is compared with all of them."""


def code_bytes(index_key: str, dim: int) -> int:
    """The bytes of a vector of `dim` dimensions: its code, its id, its graph links. ConfigError: no such index key."""
    index = make(index_key, dim)  # a name for it: faiss's casts do not keep their owner alive
    return math.ceil(_code(index))


def template_bytes(index_key: str, dim: int) -> int:
    """The bytes of the trained empty index: centroids, their graph, codebooks, matrices. ConfigError: no such key."""
    index = make(index_key, dim)
    return math.ceil(_template(index))


def served_bytes(index_key: str, rows: int, dim: int) -> int:
    """The memory of an index of `rows` rows when served. ConfigError: no such index key."""
    index = make(index_key, dim)
    lists = getattr(innermost(index), "nlist", 0)
    return math.ceil(rows * _code(index) + _template(index)) + LIST * lists + predictor_bytes(lists, dim)


def predictor_bytes(lists: int, dim: int) -> int:
    """The memory of two kinds' predictors and their centroids; 0 for more lists than are predicted."""
    return 12 * dim * lists if lists <= PREDICTED_LISTS else 0


def _code(index: Index) -> float:
    faiss = load()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _code(index.index)
    if isinstance(index, faiss.IndexIDMap):
        return ID + _code(index.index)
    if isinstance(index, faiss.IndexRefine):
        return _code(index.base_index) + _code(index.refine_index)
    if isinstance(index, faiss.IndexIVF):
        return float(ID + index.code_size)
    if isinstance(index, faiss.IndexHNSW):
        # A row is on level l with probability M^-l (Malkov & Yashunin 2018, m_L = 1 / ln M), with M
        # links of 4 bytes there, twice as many on level 0; its level takes 4 bytes, its offset 8.
        links, above = int(index.hnsw.nb_neighbors(0)), int(index.hnsw.nb_neighbors(1))
        return _code(index.storage) + 4 * links + 4 * above / (above - 1) + 4 + 8
    return float(index.sa_code_size())


def _template(index: Index) -> float:
    faiss = load()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        steps = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
        return sum(_matrix(step) for step in steps) + _template(index.index)
    if isinstance(index, faiss.IndexIDMap):
        return _template(index.index)
    if isinstance(index, faiss.IndexRefine):
        return _template(index.base_index) + _template(index.refine_index)
    if isinstance(index, faiss.IndexHNSW):
        return _template(index.storage)
    codebooks = 4.0 * int(index.pq.ksub) * int(index.d) if hasattr(index, "pq") else 0.0
    lists = int(index.nlist) * (8 + _code(index.quantizer)) if isinstance(index, faiss.IndexIVF) else 0.0
    return codebooks + lists


def _matrix(step: Any) -> float:
    """The bytes of a transform's matrices; a PCA keeps all its components too."""
    kept = step.d_out + (step.d_in if isinstance(step, load().PCAMatrix) else 0)
    return 4.0 * int(step.d_in) * int(kept)
