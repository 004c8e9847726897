"""Near-identical rows of OUT: which repeat an earlier one, found before an index is built, and reported.

Rows are gone through in the order of OUT. A row is a duplicate if its vector equals an earlier row's
bit for bit, wherever that is; or if its cosine with an earlier row that is kept reaches the threshold
and both lie in one list of the coarse quantizer. A pair on the border of two lists is not seen.
The answer depends on the rows and their lists alone: not on parts, memory or threads.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_batch.embeddings.reader import BLOCK, Embeddings, Rows
from clip_batch.storage import npy
from clip_batch.storage.npy import Half, Vectors

Floats = npt.NDArray[np.float32]
Pair = tuple[int, int, float]
"""A row that is left out, the kept one that it repeats, their cosine."""

BUDGET = 1 << 30
"""Bytes of vectors, or of hashes, held at a time; besides, about 8 bytes for each row of OUT."""

TILE = 1024
"""Rows compared with each other by one matrix product."""

DOUBT = 1e-4
"""A float32 product of unit vectors is off by less; what comes nearer to the threshold is computed in float64."""

REPORT_ROWS = 1 << 18
"""Duplicates whose metadata is held at a time."""


@dataclass(frozen=True)
class Duplicates:
    """`rows` (m,) ascending are left out, for each repeats the row `kept` (m,) with cosine `score` (m,).

    Of several kept rows within the threshold, it is the earliest.
    """

    rows: Rows
    kept: Rows
    score: Floats


def find(
    source: Embeddings,
    kind: str,
    assign: Callable[[Vectors], Rows],
    threshold: float,
    progress: Callable[[str], None] = lambda line: None,
    budget: int = BUDGET,
) -> Duplicates:
    """The rows of OUT that repeat an earlier one by their vectors of a kind, at cosine >= threshold (0..1].

    `assign` gives the list (n,) of each unit vector (n, dim). A threshold of 1 means equal float16
    vectors; it needs no lists. All-zero rows (no caption) repeat nothing. OUT is read once, and for
    a threshold below 1 once more for each `budget` bytes of its vectors. Disk in TMPDIR: 16 bytes a row.
    """
    lists = np.full(source.rows if threshold < 1 else 0, -1, dtype=np.int32)
    filled = np.ones(source.rows, dtype=np.bool_)
    with tempfile.TemporaryFile(prefix="clip-batch-hashes-") as spool:
        hashes = np.memmap(spool, dtype=np.uint64, mode="w+", shape=(source.rows, 2))
        for start, rows, data in _read(source, kind, hashes):
            some = np.flatnonzero(npy.filled(data))
            filled[start : start + len(rows)] = False
            filled[start + some] = True
            if len(lists) and len(some):
                lists[start + some] = assign(npy.unit(data[some]))
        repeats, originals = _equal(source, kind, hashes, filled, budget)
    progress(f"{len(repeats):,} rows equal an earlier one")
    near = [np.empty((0, 3))]
    if threshold < 1:
        lists[repeats] = -1  # an equal row shares the fate of the first of its kind
        for rows in _groups(lists, source.dim, budget):
            near.append(np.array(list(_near(source, kind, rows, lists, threshold, budget))).reshape(-1, 3))
        progress(f"{sum(map(len, near)):,} more have a cosine of {threshold} or more with an earlier one")
    return _join(repeats, originals, np.concatenate(near))


def _read(source: Embeddings, kind: str, hashes: npt.NDArray[np.uint64]) -> Iterator[tuple[int, Rows, Half]]:
    """Blocks of (start, rows, vectors), read and hashed a block ahead; `hashes` (n, 2) is filled."""

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
    source: Embeddings, kind: str, hashes: npt.NDArray[np.uint64], filled: npt.NDArray[np.bool_], budget: int
) -> tuple[Rows, Rows]:
    """(rows that equal an earlier one, ascending; the first row that each equals)."""
    shares = -(-96 * len(hashes) // budget)  # of the hashes' range, sorted one at a time
    found = [(np.empty(0, dtype=np.int64),) * 2]
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
        found.append((rows[~new], first[~new]))
    repeats, originals = (np.concatenate([pair[side] for pair in found]) for side in (0, 1))
    order = np.argsort(repeats)
    repeats, originals = repeats[order], originals[order]
    same = [np.empty(0, dtype=np.bool_)]
    for start in range(0, len(repeats), BLOCK):
        pairs = repeats[start : start + BLOCK], originals[start : start + BLOCK]
        same.append(np.all(_take(source, kind, pairs[0]) == _take(source, kind, pairs[1]), axis=1))
    equal = np.concatenate(same)
    return repeats[equal], originals[equal]


def _take(source: Embeddings, kind: str, rows: Rows) -> Half:
    """Rows (n,) in any order, with repeats."""
    wanted, back = np.unique(rows, return_inverse=True)
    return source.gather(kind, wanted)[back]


def _groups(lists: npt.NDArray[np.int32], dim: int, budget: int) -> Iterator[Rows]:
    """The rows of some lists at a time, list by list, ascending in each: at most `budget` bytes, or one list."""
    counts = np.zeros(1, dtype=np.int64)
    for start in range(0, len(lists), BLOCK):
        more = np.bincount(lists[start : start + BLOCK] + 1, minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    groups = (np.cumsum(counts[1:]) * 2 * dim - 1) // budget
    bounds = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
    for low, high in pairwise(bounds):
        rows = np.flatnonzero((lists >= low) & (lists < high))
        if len(rows) > 1:
            yield rows[np.argsort(lists[rows], kind="stable")]


def _near(
    source: Embeddings, kind: str, rows: Rows, lists: npt.NDArray[np.int32], threshold: float, budget: int
) -> Iterator[Pair]:
    """The near duplicates among rows that are ordered by list."""
    ends = np.flatnonzero(np.diff(lists[rows])) + 1
    pieces = [piece for piece in np.split(rows, ends) if len(piece) > 1]
    if len(rows) * source.dim > budget:
        for piece in pieces:
            yield from _long(source, kind, piece, threshold, budget)
        return
    wanted = np.sort(rows)
    data = source.gather(kind, wanted)
    for piece in pieces:
        yield from _pairs(piece, npy.unit(data[np.searchsorted(wanted, piece)]), threshold)[0]


def _long(source: Embeddings, kind: str, rows: Rows, threshold: float, budget: int) -> Iterator[Pair]:
    """The same of one list that is larger than the budget: each segment against what was kept of those before."""
    length = max(TILE, budget // (8 * source.dim))
    kept: list[Rows] = []
    for start in range(0, len(rows), length):
        left = rows[start : start + length]
        exact = npy.unit(source.gather(kind, left))
        for earlier in kept:
            found, out = _against(left, exact, earlier, npy.unit(source.gather(kind, earlier)), threshold)
            yield from found
            left, exact = left[~out], exact[~out]
        found, out = _pairs(left, exact, threshold)
        yield from found
        kept.append(left[~out])


def _pairs(rows: Rows, exact: Vectors, threshold: float) -> tuple[list[Pair], npt.NDArray[np.bool_]]:
    """Duplicates among the rows of one list, with unit vectors (n, dim); and which rows (n,) they are."""
    out = np.zeros(len(rows), dtype=np.bool_)
    found: list[Pair] = []
    kept = np.empty(0, dtype=np.int64)
    for start in range(0, len(rows), TILE):
        tile = np.arange(start, min(start + TILE, len(rows)))
        pairs, gone = _against(rows[tile], exact[tile], rows[kept], exact[kept], threshold)
        found += pairs
        out[tile] = gone
        left = tile[~gone]
        near, later, scores = _close(exact[left], exact[left], threshold)
        for row, earlier, score in zip(left[later], left[near], scores, strict=True):
            if earlier < row and not out[earlier] and not out[row]:
                out[row] = True
                found.append((int(rows[row]), int(rows[earlier]), float(score)))
        kept = np.concatenate([kept, left[~out[left]]])
    return found, out


def _against(
    rows: Rows, exact: Vectors, kept: Rows, theirs: Vectors, threshold: float
) -> tuple[list[Pair], npt.NDArray[np.bool_]]:
    """Duplicates among rows (n,) of earlier kept rows (m,), ascending; and which rows (n,) they are."""
    out = np.zeros(len(rows), dtype=np.bool_)
    found: list[Pair] = []
    for start in range(0, len(rows), TILE):
        for low in range(0, len(kept), 4 * TILE):
            near, later, scores = _close(exact[start : start + TILE], theirs[low : low + 4 * TILE], threshold)
            for row, earlier, score in zip(later + start, near + low, scores, strict=True):
                if not out[row]:
                    out[row] = True
                    found.append((int(rows[row]), int(kept[earlier]), float(score)))
    return found, out


def _close(mine: Vectors, theirs: Vectors, threshold: float) -> tuple[Any, Any, Any]:
    """Positions (in theirs, in mine) of the pairs whose cosine reaches the threshold, and it; by mine, then theirs.

    The matrix product only proposes: its last digits depend on shapes and threads, so a float64 sum decides.
    """
    later, near = np.nonzero(mine @ theirs.T >= threshold - DOUBT)
    scores = np.empty(len(later))
    for start in range(0, len(later), TILE):
        at = slice(start, start + TILE)
        scores[at] = np.sum(mine[later[at]].astype(np.float64) * theirs[near[at]], axis=1)
    sure = scores >= threshold
    return near[sure], later[sure], scores[sure]


def _join(repeats: Rows, originals: Rows, near: npt.NDArray[np.float64]) -> Duplicates:
    """Equal rows and near ones (m, 3) together: a row that equals one left out repeats what that one repeats."""
    near = near[np.argsort(near[:, 0])]
    rows, kept, score = near[:, 0].astype(np.int64), near[:, 1].astype(np.int64), near[:, 2]
    at = np.searchsorted(rows, originals)
    moved = np.append(rows, -1)[at] == originals
    whole = np.concatenate([repeats, rows])
    order = np.argsort(whole)
    return Duplicates(
        whole[order],
        np.concatenate([np.where(moved, np.append(kept, -1)[at], originals), kept])[order],
        np.concatenate([np.where(moved, np.append(score, 1)[at], 1), score])[order].astype(np.float32),
    )


def write_report(duplicates: Duplicates, source: Embeddings, path: str) -> None:
    """Write a Parquet file of one row a duplicate, by its row in OUT.

    Columns: partition, row, key, shard of what is left out; kept_partition, kept_row, kept_key, kept_shard; score.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["partition", "row", "key", "shard"]
    types = [pa.int32(), pa.int32(), pa.string(), pa.string()]
    fields = [(prefix + name, kind) for prefix in ("", "kept_") for name, kind in zip(names, types, strict=True)]
    schema = pa.schema([*fields, ("score", pa.float32())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, len(duplicates.rows), REPORT_ROWS):
            at = slice(start, start + REPORT_ROWS)
            wanted = np.unique(np.concatenate([duplicates.rows[at], duplicates.kept[at]]))
            known = _describe(source, wanted, names)
            columns: list[Any] = []
            for rows in (duplicates.rows[at], duplicates.kept[at]):
                taken = known.take(pa.array(np.searchsorted(wanted, rows)))
                columns += [taken[name].cast(kind) for name, kind in zip(names, types, strict=True)]
            writer.write_table(pa.table([*columns, pa.array(duplicates.score[at])], schema=schema))


def _describe(source: Embeddings, wanted: Rows, names: list[str]) -> Any:
    """The metadata columns of rows (n,), ascending."""
    import pyarrow as pa

    pieces = []
    for start in range(0, source.rows, 4 * BLOCK):
        stop = min(start + 4 * BLOCK, source.rows)
        low, high = np.searchsorted(wanted, [start, stop])
        if low == high:
            continue
        first, last = int(wanted[low]), int(wanted[high - 1]) + 1
        tables = [table.select(names) for table in source.read_metadata(first, last)]
        pieces.append(pa.concat_tables(tables).take(pa.array(wanted[low:high] - first)))
    return pa.concat_tables(pieces).combine_chunks()
