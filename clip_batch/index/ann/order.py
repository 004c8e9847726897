"""The order of hits: by descending score, then by ascending id, whatever found them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_NONE = 2**32 - 1
"""What an id of -1 is in 32 bits; where all ids are below it, they are sorted on the fast way."""

_MANY = 20_000
"""Hits from which numpy's radix sort, which it has for 16 bits only, is the faster one in four passes."""


def best(scores: Scores, ids: Ids, k: int) -> tuple[Scores, Ids]:
    """The k best of scores and ids (q, any), in order: float32 and int64 (q, k); -inf and -1 beyond."""
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
    """The first k columns in order: a score and its id are sorted as one number of 64 bits."""
    keys = _turned((np.float32(0) - scores).view(np.int32)).astype(np.int64) << 32
    keys |= ids & _NONE
    if (keys[:, 1:] < keys[:, :-1]).any():
        keys = _radix(keys[0])[None] if len(keys) == 1 and keys.size >= _MANY else np.sort(keys)
    keys = keys[:, :k]
    ids = keys & _NONE
    ids[ids == _NONE] = -1
    return np.float32(0) - _turned((keys >> 32).astype(np.int32)).view(np.float32), ids


def _turned(bits: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The bits of floats as whole numbers of the same order; and back."""
    return bits ^ ((bits >> 31) & np.int32(2**31 - 1))


def _radix(keys: Ids) -> Ids:
    """Keys (n,) in ascending order."""
    for shift in (0, 16, 32, 48):
        digits = (keys >> shift).astype(np.uint16)
        if shift == 48:
            digits ^= np.uint16(2**15)  # negative ones come first
        keys = keys[np.argsort(digits, kind="stable")]
    return keys
