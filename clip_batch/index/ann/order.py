"""The order of hits: by descending score, then by ascending id, the same for every kind of index."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_NONE = 2**32 - 1
"""The id -1 in 32 bits. Where all ids are less, score and id are sorted as one number (see docs/experiments.md)."""


def best(scores: Scores, ids: Ids, k: int) -> tuple[Scores, Ids]:
    """The k best of scores and ids (q, any), in order: float32 and int64 (q, k), -inf and -1 where there are fewer."""
    scores = scores.astype(np.float32, copy=False)
    if ids.size and ids.max() >= _NONE:
        order = np.lexsort((ids, -scores), axis=-1)[:, :k]
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    else:
        scores, ids = _sorted(scores, ids, k)
    room = [(0, 0), (0, k - ids.shape[1])]
    if not any(room[1]):
        return scores, ids
    return np.pad(scores, room, constant_values=-np.inf), np.pad(ids, room, constant_values=-1)


def _sorted(scores: Scores, ids: Ids, k: int) -> tuple[Scores, Ids]:
    """The first k columns in order; a score and its id are sorted as one number of 64 bits."""
    packed = _ordered_bits((np.float32(0) - scores).view(np.int32)).astype(np.int64) << 32
    packed |= ids & _NONE
    if (packed[:, 1:] < packed[:, :-1]).any():
        packed = np.sort(packed)
    packed = packed[:, :k]
    ids = packed & _NONE
    ids[ids == _NONE] = -1
    return np.float32(0) - _ordered_bits((packed >> 32).astype(np.int32)).view(np.float32), ids


def _ordered_bits(bits: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The bits of floats as whole numbers that sort as the floats do; its own inverse."""
    return bits ^ ((bits >> 31) & np.int32(2**31 - 1))
