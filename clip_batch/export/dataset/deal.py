"""The order of an epoch's rows, their division among ranks and workers, and which of them remain.

A rank's rows of an epoch are a list, and a position is an index into that list. Of W workers, worker w reads the
positions w, w + W, ... A phase records how many of its positions each worker has read. If the number of workers
changes, the positions that the phase left are divided anew, and a new phase begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WINDOW = 4096
"""Rows that are shuffled together after the blocks were drawn."""

Rows = npt.NDArray[np.int64]
Phases = Sequence[Sequence[int]]


def share(rows: int, rank: int, world: int) -> tuple[int, int]:
    """Return the range [start, stop) of a rank's rows. The ranks' shares differ by at most one row."""
    return rows * rank // world, rows * (rank + 1) // world


def epoch_rows(rows: int, seed: int | None, epoch: int, block: int = 1, rank: int = 0, world: int = 1) -> Rows:
    """Return a rank's rows int64 (n,) of an epoch, in order. All ranks together have each of 0 to rows - 1 once.

    Blocks of `block` neighbouring rows are drawn in random order and divided into one share per rank; then each WINDOW
    of rows is shuffled. A `block` of 1 is a full permutation. Without a seed the rows stay in order.
    """
    start, stop = share(rows, rank, world)
    if seed is None:
        return np.arange(start, stop)
    random = np.random.RandomState([seed & 0xFFFFFFFF, epoch])  # numpy promises that its numbers never change
    blocks = random.permutation(-(-rows // block))
    shuffled = (blocks[:, None] * block + np.arange(block)).ravel()
    share_rows: Rows = shuffled[shuffled < rows][start:stop].astype(np.int64)
    for first in range(0, len(share_rows), WINDOW):
        random.shuffle(share_rows[first : first + WINDOW])
    return share_rows


def left(count: int, phases: Phases) -> Rows:
    """Return the ascending positions int64 (n,), of 0 to count - 1, that no worker of these phases has read."""
    positions = np.arange(count)
    for read in phases:
        ordinal = np.arange(len(positions))
        positions = positions[ordinal // len(read) >= np.asarray(read)[ordinal % len(read)]]
    return positions


def begin(phases: Phases, workers: int) -> tuple[list[list[int]], list[int]]:
    """Return the phases that are over, and the current phase of a pass with that many workers."""
    *over, last = [list(phase) for phase in phases] or [[]]
    if len(last) == workers:
        return over, last
    return [*over, last] if any(last) else over, [0] * workers
