"""Finds the duplicates of OUT, rows that repeat another row, before an index is built.

A row is a duplicate if its vector equals an earlier row's bit for bit; or if its cosine with a row that is kept reaches
the threshold and both are among the rows of one list. A row is among those of its own list of the coarse quantizer and
of the nearest other lists (`VISITS`), so that a pair on the border of two lists is found too. No row is left out for
the sake of one that is itself left out: of a chain a, b, c whose neighbours alone are alike, a and c are kept. The
result depends on the rows and their lists alone, not on parts, memory or threads.

`live_duplicates` compares with the rows of the version that is added to, `duplicate_report` writes what was found, and
`duplicate_share` measures how much that is.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_batch.embeddings.outputs import Outputs
from clip_batch.embeddings.reader import BLOCK, Embeddings, Rows
from clip_batch.storage import npy
from clip_batch.storage.npy import Half, Vectors

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
Pair = tuple[int, int, float]
"""A row that repeats another one, that one, their cosine."""

VISITS = 3
"""Lists of whose rows each row is one: 98 % of pairs at a cosine of 0.92, hardly clustered, share one (of 1: 73 %)."""

BUDGET = 1 << 30
"""Bytes of vectors, or of hashes, in memory at a time, besides about 20 bytes for each row of OUT."""

TILE = 1024
"""Rows compared with each other by one matrix product."""

DOUBT = 1e-4
"""Bound on the error of a float32 product of unit vectors; pairs closer to the threshold are computed in float64."""

BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
"""The cosine that is recorded of rows that are not equal, at most."""


@dataclass(frozen=True)
class Duplicates:
    """`rows` (m,), ascending, are left out; each repeats `kept` (m,) with the cosine `score` (m,), 1 if they are equal.

    `kept` is a row of OUT, or where `live` (m,) is true, the id of a row of the version that is added to.
    """

    rows: Rows
    kept: Rows
    score: Floats
    live: Flags


def find(
    source: Embeddings | Outputs,
    kind: str,
    assign: Callable[[Vectors], Rows],
    threshold: float,
    progress: Callable[[str], None] = lambda line: None,
    budget: int = BUDGET,
    without: Rows | None = None,
) -> Duplicates:
    """The rows of OUT that repeat another one by their vectors of a kind, at cosine >= threshold (0..1].

    `assign` gives the lists (n, `VISITS` or fewer) of unit vectors (n, dim), whose rows each one is compared with. A
    threshold of 1 means equal float16 vectors and needs no lists. All-zero rows (no caption) are no duplicates, and
    rows in `without` neither are nor have any. OUT is read once, and for a threshold below 1 `VISITS` more for each
    `budget` bytes of its vectors. Disk in TMPDIR: 16 bytes a row.
    """
    lists = np.full((source.rows if threshold < 1 else 0, VISITS), -1, dtype=np.int32)
    filled = np.ones(source.rows, dtype=np.bool_)
    with tempfile.TemporaryFile(prefix="clip-batch-hashes-") as spool:
        hashes = np.memmap(spool, dtype=np.uint64, mode="w+", shape=(source.rows, 2))
        for start, rows, data in _read(source, kind, hashes):
            some = np.flatnonzero(npy.filled(data))
            filled[start : start + len(rows)] = False
            filled[start + some] = True
            if len(lists) and len(some):
                own = assign(npy.unit(data[some]))
                lists[start + some, : own.shape[1]] = own
        if without is not None:
            filled[without] = False
            if len(lists):
                lists[without] = -1
        repeats, originals = _equal(source, kind, hashes, filled, budget)
    progress(f"{len(repeats):,} rows equal an earlier one")
    near = np.empty((0, 3))
    if threshold < 1:
        lists[repeats] = -1  # an equal row is a duplicate whatever becomes of the first of its kind
        near = _near(source, kind, lists, threshold, budget)
        progress(f"{len(near):,} more have a cosine of {threshold} or more with another one that is kept")
    return _join(repeats, originals, near)


def _read(source: Embeddings | Outputs, kind: str, hashes: npt.NDArray[np.uint64]) -> Iterator[tuple[int, Rows, Half]]:
    """Yield blocks of (start, rows, vectors), read and hashed a block ahead; fills `hashes` (n, 2)."""

    def load(start: int) -> tuple[int, Rows, Half]:
        stop = min(start + BLOCK, source.rows)
        data = source.read_vectors(kind, start, stop)
        digests = b"".join([hashlib.blake2b(row, digest_size=16).digest() for row in data])
        hashes[start:stop] = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
        return start, np.arange(start, stop), data

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, 0)
        for start in range(0, source.rows, BLOCK):
            block = ahead.result()
            if start + BLOCK < source.rows:
                ahead = pool.submit(load, start + BLOCK)
            yield block


def _equal(
    source: Embeddings | Outputs, kind: str, hashes: npt.NDArray[np.uint64], filled: npt.NDArray[np.bool_], budget: int
) -> tuple[Rows, Rows]:
    """(rows that equal an earlier one, ascending; the first row that each equals)."""
    shares = -(-96 * len(hashes) // budget)  # the range of hashes is cut into these, sorted one at a time
    pairs = [(np.empty(0, dtype=np.int64),) * 2]
    for share in range(shares):
        picked = [
            start + np.flatnonzero((hashes[start : start + BLOCK, 0] % shares == share) & filled[start : start + BLOCK])
            for start in range(0, len(hashes), BLOCK)
        ]
        rows = np.concatenate(picked)
        own = hashes[rows]
        order = np.lexsort((rows, own[:, 1], own[:, 0]))
        rows, own = rows[order], own[order]
        new = np.ones(len(rows), dtype=np.bool_)
        new[1:] = np.any(own[1:] != own[:-1], axis=1)
        first = rows[np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))]
        pairs.append((rows[~new], first[~new]))
    repeats, originals = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    order = np.argsort(repeats)
    repeats, originals = repeats[order], originals[order]
    same = [np.empty(0, dtype=np.bool_)]
    for start in range(0, len(repeats), BLOCK):
        later, earlier = repeats[start : start + BLOCK], originals[start : start + BLOCK]
        same.append(np.all(_take(source, kind, later) == _take(source, kind, earlier), axis=1))
    equal = np.concatenate(same)
    return repeats[equal], originals[equal]


def _take(source: Embeddings | Outputs, kind: str, rows: Rows) -> Half:
    """The vectors of rows (n,) in any order, repeats allowed."""
    ascending, back = np.unique(rows, return_inverse=True)
    return source.gather(kind, ascending)[back]


def _near(
    source: Embeddings | Outputs, kind: str, lists: npt.NDArray[np.int32], threshold: float, budget: int
) -> npt.NDArray[np.float64]:
    """The near duplicates (m, 3) among the rows with lists (n, any; -1: none): each row, its kept one, their cosine.

    Each list says by itself which of its rows repeat an earlier one that the list keeps. A row that no list leaves out
    is kept. One whose every partner is left out by another list is compared again, with the rows that were kept and
    with others like it, until all are decided: the first of them always is.
    """
    kept = np.zeros(len(lists), dtype=np.bool_)
    open_rows = lists[:, 0] >= 0
    decided = [np.empty((0, 3))]
    while open_rows.any():
        pieces = [np.empty((0, 3))]
        for numbers, rows in _groups(lists, kept, open_rows, source.dim, budget):
            pieces.append(_as_array(_in_lists(source, kind, numbers, rows, threshold, budget)))
        pairs = np.concatenate(pieces)
        pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
        kept |= open_rows
        open_rows[:] = False
        open_rows[pairs[:, 0].astype(np.int64)] = True
        kept &= ~open_rows
        chosen = []
        for place, (row, partner) in enumerate(pairs[:, :2].astype(np.int64)):
            if open_rows[row] and kept[partner]:  # the partner is decided: it was before, or is an earlier row
                open_rows[row] = False
                chosen.append(place)
        decided.append(pairs[chosen])
    return np.concatenate(decided)


def _as_array(pairs: Iterable[Pair]) -> npt.NDArray[np.float64]:
    """Pairs as an array (m, 3)."""
    return np.array(list(pairs), dtype=np.float64).reshape(-1, 3)


def _groups(
    lists: npt.NDArray[np.int32], kept: Flags, open_rows: Flags, dim: int, budget: int
) -> Iterator[tuple[Rows, Rows]]:
    """Yield the rows of some lists at a time that are kept or open, and their lists: (lists (m,), rows (m,)).

    They are in the order of lists, in each the kept ones first, then by row; lists without open rows are passed over.
    A time is at most `budget` bytes of vectors, or one list.
    """
    count = int(lists.max(initial=-1)) + 1
    sizes, of_open = (np.zeros(count, dtype=np.int64) for _ in range(2))
    for start in range(0, len(lists), BLOCK):
        block = slice(start, start + BLOCK)
        for counts, mask in ((sizes, kept[block] | open_rows[block]), (of_open, open_rows[block])):
            numbers = lists[block][mask]
            counts += np.bincount(numbers[numbers >= 0], minlength=count)
    sizes[of_open == 0] = 0
    groups = (np.cumsum(sizes) * 2 * dim - 1) // budget
    bounds = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), count]
    for low, high in pairwise(bounds):
        if not sizes[low:high].any():
            continue
        pieces = []
        for start in range(0, len(lists), BLOCK):
            block = slice(start, start + BLOCK)
            inside = (lists[block] >= low) & (lists[block] < high) & (kept[block] | open_rows[block])[:, None]
            places, columns = np.nonzero(inside)
            pieces.append((lists[block][places, columns].astype(np.int64), start + places))
        numbers = np.concatenate([piece[0] for piece in pieces])
        rows = np.concatenate([piece[1] for piece in pieces])
        some = sizes[numbers] > 0
        numbers, rows = numbers[some], rows[some]
        order = np.lexsort((rows, ~kept[rows], numbers))
        yield numbers[order].astype(np.int64), rows[order].astype(np.int64)


def _in_lists(
    source: Embeddings | Outputs, kind: str, numbers: Rows, rows: Rows, threshold: float, budget: int
) -> Iterator[Pair]:
    """Yield what each list leaves out of its rows, which are ordered by list (`numbers`)."""
    ends = np.flatnonzero(np.diff(numbers)) + 1
    pieces = [piece for piece in np.split(rows, ends) if len(piece) > 1]
    if len(rows) * source.dim > budget:
        for piece in pieces:
            yield from _in_long_list(source, kind, piece, threshold, budget)
        return
    ascending = np.unique(rows)
    data = source.gather(kind, ascending)
    for piece in pieces:
        yield from _in_list(piece, npy.unit(data[np.searchsorted(ascending, piece)]), threshold)[0]


def _in_long_list(source: Embeddings | Outputs, kind: str, rows: Rows, threshold: float, budget: int) -> Iterator[Pair]:
    """Yield those of one list larger than the budget: each segment is compared with the kept rows of those before."""
    length = max(TILE, budget // (8 * source.dim))
    kept: list[Rows] = []
    for start in range(0, len(rows), length):
        left = rows[start : start + length]
        exact = npy.unit(_take(source, kind, left))
        for earlier in kept:
            pairs, out = _against(left, exact, earlier, npy.unit(_take(source, kind, earlier)), threshold)
            yield from pairs
            left, exact = left[~out], exact[~out]
        pairs, out = _in_list(left, exact, threshold)
        yield from pairs
        kept.append(left[~out])


def _in_list(rows: Rows, exact: Vectors, threshold: float) -> tuple[list[Pair], npt.NDArray[np.bool_]]:
    """The duplicates among the rows of one list, of unit vectors `exact` (n, dim); and which rows (n,) they are."""
    out = np.zeros(len(rows), dtype=np.bool_)
    pairs: list[Pair] = []
    kept = np.empty(0, dtype=np.int64)
    for start in range(0, len(rows), TILE):
        tile = np.arange(start, min(start + TILE, len(rows)))
        earlier_pairs, dropped = _against(rows[tile], exact[tile], rows[kept], exact[kept], threshold)
        pairs += earlier_pairs
        out[tile] = dropped
        left = tile[~dropped]
        near, later, scores = close(exact[left], exact[left], threshold)
        for row, earlier, score in zip(left[later], left[near], scores, strict=True):
            if earlier < row and not out[earlier] and not out[row]:
                out[row] = True
                pairs.append((int(rows[row]), int(rows[earlier]), float(score)))
        kept = np.concatenate([kept, left[~out[left]]])
    return pairs, out


def _against(
    rows: Rows, exact: Vectors, kept: Rows, theirs: Vectors, threshold: float
) -> tuple[list[Pair], npt.NDArray[np.bool_]]:
    """The duplicates among rows (n,) of rows (m,) that come before; and which rows (n,) they are."""
    out = np.zeros(len(rows), dtype=np.bool_)
    pairs: list[Pair] = []
    for start in range(0, len(rows), TILE):
        for low in range(0, len(kept), 4 * TILE):
            near, later, scores = close(exact[start : start + TILE], theirs[low : low + 4 * TILE], threshold)
            for row, earlier, score in zip(later + start, near + low, scores, strict=True):
                if not out[row]:
                    out[row] = True
                    pairs.append((int(rows[row]), int(kept[earlier]), float(score)))
    return pairs, out


def close(mine: Vectors, theirs: Vectors, threshold: float) -> tuple[Any, Any, Any]:
    """Positions (in `theirs`, in `mine`) and cosines of the pairs that reach the threshold; by `mine`, then `theirs`.

    The matrix product selects candidates only: its last digits depend on shapes and threads, so a float64 sum decides.
    """
    later, near = np.nonzero(mine @ theirs.T >= threshold - DOUBT)
    scores = np.empty(len(later))
    for start in range(0, len(later), TILE):
        part = slice(start, start + TILE)
        scores[part] = np.sum(mine[later[part]].astype(np.float64) * theirs[near[part]], axis=1)
    close = scores >= threshold
    return near[close], later[close], scores[close]


def _join(repeats: Rows, originals: Rows, near: npt.NDArray[np.float64]) -> Duplicates:
    """Join equal rows and near ones (m, 3): a row that equals one that is left out repeats what that one repeats."""
    near = near[np.argsort(near[:, 0])]
    rows, kept, score = near[:, 0].astype(np.int64), near[:, 1].astype(np.int64), np.minimum(near[:, 2], BELOW_ONE)
    at = np.searchsorted(rows, originals)
    moved = np.append(rows, -1)[at] == originals
    whole = np.concatenate([repeats, rows])
    order = np.argsort(whole)
    return Duplicates(
        whole[order],
        np.concatenate([np.where(moved, np.append(kept, -1)[at], originals), kept])[order],
        np.concatenate([np.where(moved, np.append(score, 1)[at], 1), score])[order].astype(np.float32),
        np.zeros(len(whole), dtype=np.bool_),
    )


def concatenated(pieces: Sequence[Duplicates]) -> Duplicates:
    """Several duplicates, no row twice, as one, by ascending row."""
    order = np.argsort(np.concatenate([piece.rows for piece in pieces]))
    return Duplicates(
        np.concatenate([piece.rows for piece in pieces])[order],
        np.concatenate([piece.kept for piece in pieces])[order],
        np.concatenate([piece.score for piece in pieces])[order],
        np.concatenate([piece.live for piece in pieces])[order],
    )
