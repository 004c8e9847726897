"""Finds and reports the duplicates of OUT, rows that repeat an earlier row, before an index is built.

Rows are compared in the order of OUT. A row is a duplicate if its vector equals an earlier row's bit for bit; or if its
cosine with an earlier row that is kept reaches the threshold and both are in the same list of the coarse quantizer. A
pair in two neighbouring lists is not found. The result depends on the rows and their lists alone, not on parts, memory
or threads.
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

from clip_batch.embeddings.outputs import Outputs
from clip_batch.embeddings.reader import BLOCK, Embeddings, Rows
from clip_batch.storage import npy
from clip_batch.storage.npy import Half, Vectors

Floats = npt.NDArray[np.float32]
Pair = tuple[int, int, float]
"""A row that is left out, the kept one that it repeats, their cosine."""

BUDGET = 1 << 30
"""Bytes of vectors, or of hashes, in memory at a time, besides about 8 bytes for each row of OUT."""

TILE = 1024
"""Rows compared with each other by one matrix product."""

DOUBT = 1e-4
"""Bound on the error of a float32 product of unit vectors; pairs closer to the threshold are computed in float64."""

REPORT_ROWS = 1 << 18
"""Duplicates whose metadata is in memory at a time."""


@dataclass(frozen=True)
class Duplicates:
    """`rows` (m,), ascending, are left out; each repeats the row `kept` (m,) with the cosine `score` (m,).

    Where several kept rows reach the threshold, that is the earliest.
    """

    rows: Rows
    kept: Rows
    score: Floats


def find(
    source: Embeddings | Outputs,
    kind: str,
    assign: Callable[[Vectors], Rows],
    threshold: float,
    progress: Callable[[str], None] = lambda line: None,
    budget: int = BUDGET,
    without: Rows | None = None,
) -> Duplicates:
    """The rows of OUT that repeat an earlier one by their vectors of a kind, at cosine >= threshold (0..1].

    `assign` gives the list (n,) of each unit vector (n, dim). A threshold of 1 means equal float16 vectors and needs no
    lists. All-zero rows (no caption) are no duplicates, and rows in `without` neither are nor have any. OUT is read
    once, and for a threshold below 1 once more for each `budget` bytes of its vectors. Disk in TMPDIR: 16 bytes a row.
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
        if without is not None:
            filled[without] = False
            if len(lists):
                lists[without] = -1
        repeats, originals = _equal(source, kind, hashes, filled, budget)
    progress(f"{len(repeats):,} rows equal an earlier one")
    near = [np.empty((0, 3))]
    if threshold < 1:
        lists[repeats] = -1  # an equal row is a duplicate whatever becomes of the first of its kind
        for rows in _groups(lists, source.dim, budget):
            near.append(np.array(list(_near(source, kind, rows, lists, threshold, budget))).reshape(-1, 3))
        progress(f"{sum(map(len, near)):,} more have a cosine of {threshold} or more with an earlier one")
    return _join(repeats, originals, np.concatenate(near))


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


def _groups(lists: npt.NDArray[np.int32], dim: int, budget: int) -> Iterator[Rows]:
    """Yield the rows of some lists at a time, list by list, ascending in each: at most `budget` bytes, or one list."""
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
    source: Embeddings | Outputs, kind: str, rows: Rows, lists: npt.NDArray[np.int32], threshold: float, budget: int
) -> Iterator[Pair]:
    """Yield the near duplicates among rows that are ordered by list."""
    ends = np.flatnonzero(np.diff(lists[rows])) + 1
    pieces = [piece for piece in np.split(rows, ends) if len(piece) > 1]
    if len(rows) * source.dim > budget:
        for piece in pieces:
            yield from _in_long_list(source, kind, piece, threshold, budget)
        return
    ascending = np.sort(rows)
    data = source.gather(kind, ascending)
    for piece in pieces:
        yield from _in_list(piece, npy.unit(data[np.searchsorted(ascending, piece)]), threshold)[0]


def _in_long_list(source: Embeddings | Outputs, kind: str, rows: Rows, threshold: float, budget: int) -> Iterator[Pair]:
    """Yield those of one list larger than the budget: each segment is compared with the kept rows of those before."""
    length = max(TILE, budget // (8 * source.dim))
    kept: list[Rows] = []
    for start in range(0, len(rows), length):
        left = rows[start : start + length]
        exact = npy.unit(source.gather(kind, left))
        for earlier in kept:
            pairs, out = _against(left, exact, earlier, npy.unit(source.gather(kind, earlier)), threshold)
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
        near, later, scores = _close(exact[left], exact[left], threshold)
        for row, earlier, score in zip(left[later], left[near], scores, strict=True):
            if earlier < row and not out[earlier] and not out[row]:
                out[row] = True
                pairs.append((int(rows[row]), int(rows[earlier]), float(score)))
        kept = np.concatenate([kept, left[~out[left]]])
    return pairs, out


def _against(
    rows: Rows, exact: Vectors, kept: Rows, theirs: Vectors, threshold: float
) -> tuple[list[Pair], npt.NDArray[np.bool_]]:
    """The duplicates among rows (n,) of earlier kept rows (m,), ascending; and which rows (n,) they are."""
    out = np.zeros(len(rows), dtype=np.bool_)
    pairs: list[Pair] = []
    for start in range(0, len(rows), TILE):
        for low in range(0, len(kept), 4 * TILE):
            near, later, scores = _close(exact[start : start + TILE], theirs[low : low + 4 * TILE], threshold)
            for row, earlier, score in zip(later + start, near + low, scores, strict=True):
                if not out[row]:
                    out[row] = True
                    pairs.append((int(rows[row]), int(kept[earlier]), float(score)))
    return pairs, out


def _close(mine: Vectors, theirs: Vectors, threshold: float) -> tuple[Any, Any, Any]:
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


def write_report(duplicates: Duplicates, source: Embeddings | Outputs, path: str) -> None:
    """Write a Parquet file with one row for each duplicate, in the order of OUT.

    Columns: partition, row, key, shard and offset of the row that is left out; kept_partition, kept_row, kept_key,
    kept_shard and kept_offset of the row that it repeats; score.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["partition", "row", "key", "shard", "offset"]
    types = [pa.int32(), pa.int32(), pa.string(), pa.string(), pa.int64()]
    fields = [(prefix + name, kind) for prefix in ("", "kept_") for name, kind in zip(names, types, strict=True)]
    schema = pa.schema([*fields, ("score", pa.float32())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, len(duplicates.rows), REPORT_ROWS):
            part = slice(start, start + REPORT_ROWS)
            both = np.unique(np.concatenate([duplicates.rows[part], duplicates.kept[part]]))
            metadata = _metadata(source, both, names)
            columns: list[Any] = []
            for rows in (duplicates.rows[part], duplicates.kept[part]):
                taken = metadata.take(pa.array(np.searchsorted(both, rows)))
                columns += [taken[name].cast(kind) for name, kind in zip(names, types, strict=True)]
            writer.write_table(pa.table([*columns, pa.array(duplicates.score[part])], schema=schema))


def _metadata(source: Embeddings | Outputs, rows: Rows, names: list[str]) -> Any:
    """The metadata columns of rows (n,), ascending."""
    import pyarrow as pa

    pieces = []
    for start in range(0, source.rows, 4 * BLOCK):
        stop = min(start + 4 * BLOCK, source.rows)
        low, high = np.searchsorted(rows, [start, stop])
        if low == high:
            continue
        first, last = int(rows[low]), int(rows[high - 1]) + 1
        tables = [table.select(names) for table in source.read_metadata(first, last)]
        pieces.append(pa.concat_tables(tables).take(pa.array(rows[low:high] - first)))
    return pa.concat_tables(pieces).combine_chunks()
