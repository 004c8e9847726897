"""Find near duplicates among hits: the connected components of pairs whose cosine reaches a threshold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MOST = 10_000
"""Largest number of hits that are compared with each other. The work grows with the square of their number."""

_BLOCK = 256
"""Rows that are compared with all others at a time, so that memory grows linearly with the number of hits."""


def representatives(vectors: npt.NDArray[np.float32], threshold: float) -> npt.NDArray[np.bool_]:
    """Return bool (n,): which of the unit vectors (n, d) is the first of its component."""
    labels = np.arange(len(vectors))
    for start in range(0, len(vectors), _BLOCK):
        near = vectors[start : start + _BLOCK] @ vectors[start:].T >= threshold
        near &= (
            np.arange(near.shape[1]) > np.arange(len(near))[:, None]
        )  # each pair once, and no row paired with itself
        for row in np.flatnonzero(near.any(axis=1)):
            members = np.append(start + np.flatnonzero(near[row]), start + row)
            group = np.unique(labels[members])
            if len(group) > 1:
                labels[np.isin(labels, group)] = group[0]
    first: npt.NDArray[np.bool_] = labels == np.arange(len(vectors))
    return first
