"""Which row comes when, and whose it is: an epoch's order, its division among ranks and workers, what is left of it.

Only numbers: a rank's rows of an epoch are a list, and a position is a place in that list. W workers deal the
positions out, worker w has w, w + W, ... A phase is how many of its positions each worker has gone through;
should their number change, what a phase left is dealt anew, and a new phase begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WINDOW = 4096
"""Rows within which those of blocks that were drawn together are mixed."""

Rows = npt.NDArray[np.int64]
Phases = Sequence[Sequence[int]]


def share(rows: int, rank: int, world: int) -> tuple[int, int]:
    """Where a rank's part of so many rows begins and ends: no two ranks differ by more than one row."""
    return rows * rank // world, rows * (rank + 1) // world


def epoch_rows(rows: int, seed: int | None, epoch: int, block: int = 1, rank: int = 0, world: int = 1) -> Rows:
    """The rows (n,) of a rank in an epoch, in order; all ranks together have each of 0 to rows - 1 once.

    Blocks of `block` neighbouring rows are drawn in random order and cut into one part a rank; then the rows of
    each WINDOW are mixed. `block` 1 is a full permutation; without a seed rows stay as they are.
    """
    start, stop = share(rows, rank, world)
    if seed is None:
        return np.arange(start, stop)
    draw = np.random.RandomState([seed & 0xFFFFFFFF, epoch])  # the one whose numbers numpy promises to keep
    blocks = draw.permutation(-(-rows // block))
    drawn = (blocks[:, None] * block + np.arange(block)).ravel()
    mine: Rows = drawn[drawn < rows][start:stop].astype(np.int64)
    for place in range(0, len(mine), WINDOW):
        draw.shuffle(mine[place : place + WINDOW])
    return mine


def left(count: int, phases: Phases) -> Rows:
    """The positions (n,) of 0 to count - 1 that no worker of these phases has gone through, ascending."""
    positions = np.arange(count)
    for gone in phases:
        place = np.arange(len(positions))
        positions = positions[place // len(gone) >= np.asarray(gone)[place % len(gone)]]
    return positions


def begin(phases: Phases, workers: int) -> tuple[list[list[int]], list[int]]:
    """The phases that are over, and the one that so many workers go on with."""
    *over, last = [list(phase) for phase in phases] or [[]]
    if len(last) == workers:
        return over, last
    return [*over, last] if any(last) else over, [0] * workers
