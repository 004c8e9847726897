"""Near duplicates among hits: connected components of the pairs whose cosine reaches a threshold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MOST = 10_000
"""Hits that are compared with each other: the work grows with their square."""

_BLOCK = 256
"""Rows compared at once; memory is this many times the hits, never their square."""


def representatives(vectors: npt.NDArray[np.float32], threshold: float) -> npt.NDArray[np.bool_]:
    """True (n,) for the first row of each component of unit vectors (n, d)."""
    labels = np.arange(len(vectors))
    for start in range(0, len(vectors), _BLOCK):
        near = vectors[start : start + _BLOCK] @ vectors[start:].T >= threshold
        near &= np.arange(near.shape[1]) > np.arange(len(near))[:, None]  # each pair once, no row with itself
        for row in np.flatnonzero(near.any(axis=1)):
            members = np.append(start + np.flatnonzero(near[row]), start + row)
            group = np.unique(labels[members])
            if len(group) > 1:
                labels[np.isin(labels, group)] = group[0]
    first: npt.NDArray[np.bool_] = labels == np.arange(len(vectors))
    return first
