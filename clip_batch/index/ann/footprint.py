"""What an index takes, before there is one: read from the untrained index that its key makes.

Bytes are those of the index file; in memory come about 160 bytes an inverted list and, behind an id
map, a hash table of its ids. Fast-scan lists are filled up to 32 rows each, which is not counted.
"""

from __future__ import annotations

import math
from typing import Any

from clip_batch.index.ann.libfaiss import Index, load, make

ID = 8
"""Bytes of a stored id."""


def code_bytes(key: str, dim: int) -> int:
    """Bytes that a vector of `dim` takes: its code, its id, its graph links. ConfigError: no such key."""
    index = make(key, dim)  # held here: what faiss casts does not keep its owner alive
    return math.ceil(_code(index))


def template_bytes(key: str, dim: int) -> int:
    """Bytes of the trained empty index: centroids and their graph, codebooks, matrices. ConfigError: no such key."""
    index = make(key, dim)
    return math.ceil(_template(index))


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
    """Of a transform; a PCA keeps all its components too."""
    kept = step.d_out + (step.d_in if isinstance(step, load().PCAMatrix) else 0)
    return 4.0 * int(step.d_in) * int(kept)
