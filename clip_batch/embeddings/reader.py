"""The committed embeddings of OUT as one long matrix: rows in partition order, checked as they are read.

Only commits are trusted. float16 rows are scaled to unit norm in float32 (float16 rounding moves a
norm by up to 5e-4, enough to put a near duplicate before the row itself).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from clip_batch.embeddings import metadata
from clip_batch.embeddings.commits import read_commits
from clip_batch.encoders.device import cores
from clip_batch.errors import CorruptError, IncompleteError
from clip_batch.plan import paths
from clip_batch.storage.npy import Half, NpyHeader, filled, map_matrix, norms_of, read_npy_header
from clip_batch.storage.retry import corrupt_unless_unavailable
from clip_batch.storage.store import Store
from clip_batch.types import Commit, Plan, format_numbers

if TYPE_CHECKING:
    import pyarrow as pa

Rows = npt.NDArray[np.int64]

BLOCK = 16_384
"""Rows converted to float32 at a time."""

NORM_TOLERANCE = 5e-3
"""Of a row's norm: float16 rounding needs 5e-4, normalising in bfloat16 4e-3."""


@dataclass(frozen=True)
class Embeddings:
    """All committed rows of OUT; part i has the rows [starts[i], starts[i + 1]).

    A folder without commits is read by a subclass of this (see `clip_batch.embeddings.clip_retrieval`).
    """

    dtypes: ClassVar[tuple[str, ...]] = ("<f2",)
    """Of the npy files."""

    mend: ClassVar[str] = "run clip-batch verify, then repair"

    store: Store
    plan: Plan
    commits: tuple[Commit, ...]
    starts: tuple[int, ...]
    missing: tuple[int, ...]
    verified: bool = True

    @property
    def rows(self) -> int:
        return self.starts[-1]

    @property
    def dim(self) -> int:
        return self.commits[0].dim

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Commit, int, int]]:
        """(commit, first, last + 1 within its part) of the parts that hold rows [start, stop)."""
        for commit, first in zip(self.commits, self.starts, strict=False):
            low, high = max(start - first, 0), min(stop - first, commit.rows)
            if low < high:
                yield commit, low, high

    def count(self, commit: Commit) -> tuple[int, int]:
        """(rows, rows with a caption) of a part's metadata."""
        return metadata.count(self.store, _path(self, commit, paths.METADATA))

    def without_caption(self, commit: Commit) -> npt.NDArray[np.bool_]:
        """Which rows (n,) of a part have no caption."""
        return metadata.without_caption(self.store, _path(self, commit, paths.METADATA))

    def table(self, commit: Commit, start: int, stop: int) -> pa.Table:
        """Metadata rows [start, stop) of a part, with their lineage."""
        return metadata.read_rows(self.store, _path(self, commit, paths.METADATA), commit.partition, start, stop)


def open_embeddings(store: Store, plan: Plan, allow_partial: bool = False) -> Embeddings:
    """The committed parts of OUT, without reading a row.

    IncompleteError: partitions are not committed. CorruptError: commits of another plan, encoder or
    dimension, or no row at all.
    """
    commits = read_commits(store)
    missing = tuple(number for number in range(len(plan.partitions)) if number not in commits)
    if missing and not allow_partial:
        raise IncompleteError(
            f"{store.url} lacks partitions {format_numbers(missing)} of {len(plan.partitions)}: "
            f"run clip-batch worker --output {store.url} --partitions {format_numbers(missing)}, "
            "or merge with --allow-partial"
        )
    filled = tuple(commits[number] for number in sorted(commits) if commits[number].rows)
    for commit in filled:
        for what, found, wanted in (
            ("plan", commit.plan, plan.digest),
            ("encoder", commit.encoder, plan.encoder.fingerprint),
            ("dimension", commit.dim, filled[0].dim),
        ):
            if found != wanted:
                raise CorruptError(
                    f"{store.url}: partition {commit.partition} has {what} {found}, not {wanted}: "
                    f"remove its commit and run clip-batch embed --output {store.url}"
                )
    if not filled:
        raise CorruptError(f"{store.url} has no embedded row: there is nothing to merge; see clip-batch status")
    starts = tuple(int(start) for start in np.cumsum([0, *(commit.rows for commit in filled)]))
    return Embeddings(store, plan, filled, starts, missing)


def check_files(source: Embeddings, kinds: tuple[str, ...]) -> list[int]:
    """Check every part's headers, sizes and row counts; the captioned rows of each part. CorruptError if wrong."""

    def check(commit: Commit) -> int:
        for kind in kinds:
            _header(source, commit, kind)
        rows, captioned = source.count(commit)
        if rows != commit.rows:
            path = source.store.display(_path(source, commit, paths.METADATA))
            raise CorruptError(f"{path} has {rows} rows, its commit says {commit.rows}: {source.mend}")
        return captioned

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(check, source.commits))


def _path(source: Embeddings, commit: Commit, folder: str) -> str:
    if (path := commit.file(folder)) is None:
        where = f"{source.store.url}: the commit of partition {commit.partition}"
        raise CorruptError(f"{where} names no {folder} file: {source.mend}")
    return path


def _header(source: Embeddings, commit: Commit, kind: str) -> NpyHeader:
    """The header of a part's npy file, checked against its commit and the file's size."""
    store, path = source.store, _path(source, commit, paths.VECTORS[kind])
    where = store.display(path)
    with corrupt_unless_unavailable(f"{where} is not a readable npy file", source.mend, ValueError):
        with store.open(path) as file:
            header = read_npy_header(file)
        size = store.size(path)
    if header.shape != (commit.rows, commit.dim) or not header.is_matrix(source.dtypes):
        planned = f"float16 {(commit.rows, commit.dim)}"
        raise CorruptError(f"{where} is {header}, the commit says {planned}: {source.mend}")
    if size != header.file_size:
        raise CorruptError(f"{where} is cut: it has {size} bytes for {header}: {source.mend}")
    return header


def read_vectors(source: Embeddings, kind: str, start: int, stop: int) -> Half:
    """Rows [start, stop) as float16 (n, dim), not checked: see `check_rows`."""
    out = np.empty((stop - start, source.dim), dtype=np.float16)
    done = 0
    for commit, low, high in source.pieces(start, stop):
        path, header = _path(source, commit, paths.VECTORS[kind]), _header(source, commit, kind)
        width = header.dtype.itemsize * commit.dim
        with source.store.open(path) as file:
            file.seek(header.offset + low * width)
            data = file.read((high - low) * width)
        if len(data) != (high - low) * width:
            raise CorruptError(f"{source.store.display(path)} ended early: {source.mend}")
        with np.errstate(over="ignore"):  # what is too large for float16 is found when rows are checked
            out[done : done + high - low] = np.frombuffer(data, dtype=header.dtype).reshape(-1, commit.dim)
        done += high - low
    return out


def read_metadata(source: Embeddings, start: int, stop: int) -> Iterator[pa.Table]:
    """Metadata rows [start, stop), part by part, with their lineage: columns `partition` and `row` (int32)."""
    for commit, low, high in source.pieces(start, stop):
        yield source.table(commit, low, high)


def read_empty(source: Embeddings, start: int, stop: int) -> npt.NDArray[np.bool_]:
    """Which of the rows [start, stop) have no caption, so that their text vector may be all zero: (n,)."""
    found = [source.without_caption(commit)[low:high] for commit, low, high in source.pieces(start, stop)]
    return np.concatenate([np.empty(0, dtype=bool), *found])


def check_all(source: Embeddings, kinds: Sequence[str]) -> None:
    """Every row of every part, some parts at once; errors as `check_rows`."""

    def check(commit: Commit, start: int) -> None:
        empty = read_empty(source, start, start + commit.rows)
        for kind in kinds:
            for low in range(0, commit.rows, 4 * BLOCK):
                high = min(low + 4 * BLOCK, commit.rows)
                rows = read_vectors(source, kind, start + low, start + high)
                check_rows(source, kind, start + low, rows, empty[low:high] if kind == "text" else None)

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(check, source.commits, source.starts))


def check_rows(
    source: Embeddings, kind: str, start: int, vectors: Half, empty: npt.NDArray[np.bool_] | None = None
) -> None:
    """CorruptError, naming file and row, where a row of vectors (n, dim) from `start` on is not finite and unit.

    `empty` (n,) says which rows may be all zero (text rows without a caption).
    """
    for low in range(0, len(vectors), BLOCK):
        norms = norms_of(vectors[low : low + BLOCK])
        bad = ~(np.abs(norms - 1) <= NORM_TOLERANCE)
        if empty is not None:
            bad &= ~((norms == 0) & empty[low : low + BLOCK])
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            commit, row, _ = next(source.pieces(start + low + at, start + low + at + 1))
            path = source.store.display(_path(source, commit, paths.VECTORS[kind]))
            hint = " though it has a caption" if kind == "text" and norms[at] == 0 else ""
            raise CorruptError(f"{path}: row {row} has norm {norms[at]:.4g}{hint}, not 1: {source.mend}")


def _gather(source: Embeddings, kind: str, part: int, order: Rows, captioned: int) -> tuple[Rows, Half]:
    """Rows of a part in a random `order` (m,) of its row numbers: (rows, their vectors), zero rows left out.

    Memory-mapped and read in file order. CorruptError where a drawn row is not finite and unit.
    """
    commit = source.commits[part]
    path, header = _path(source, commit, paths.VECTORS[kind]), _header(source, commit, kind)
    in_file_order = np.sort(order)
    with source.store.fetch(path) as local:
        mapped = map_matrix(local, header)
        with np.errstate(over="ignore"):
            vectors = np.asarray(mapped[in_file_order], dtype=np.float16)
        del mapped
    there = filled(vectors)
    if kind == "image" or captioned == commit.rows:
        there[:] = True
    bad = ~(np.abs(norms_of(vectors) - 1) <= NORM_TOLERANCE) & there
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        check_rows(source, kind, source.starts[part] + int(in_file_order[at]), vectors[at : at + 1])
    back = np.searchsorted(in_file_order, order)
    keep = back[there[back]]
    return in_file_order[keep], vectors[keep]


def gather(source: Embeddings, kind: str, rows: Rows) -> Half:
    """Rows (n,), ascending, as float16 (n, dim), not checked; memory-mapped and read in file order."""
    out = np.empty((len(rows), source.dim), dtype=np.float16)
    cuts = np.searchsorted(rows, source.starts)
    for commit, first, low, high in zip(source.commits, source.starts, cuts, cuts[1:], strict=False):
        if low == high:
            continue
        header = _header(source, commit, kind)
        with source.store.fetch(_path(source, commit, paths.VECTORS[kind])) as local:
            mapped = map_matrix(local, header)
            with np.errstate(over="ignore"):
                out[low:high] = mapped[rows[low:high] - first]
            del mapped
    return out


def draw(
    source: Embeddings, kind: str, filled: Sequence[int], wanted: int, seed: int, without: Rows | None = None
) -> tuple[Rows, Half]:
    """`wanted` rows of a kind, from each part its share, less those in `without`: (rows (n,), vectors (n, dim)).

    `filled` counts the rows of each part that have a vector of that kind; a part with gaps is drawn
    from more than its share, and the zero rows dropped. A part's random order depends on the seed and
    its partition alone, so the draw does not change with the number of processes or parts before it.
    """
    total = sum(filled)
    ends = np.cumsum([0, *filled])
    shares = np.diff([min(wanted, total) * int(end) // total for end in ends])
    rows, vectors = [np.empty(0, dtype=np.int64)], [np.empty((0, source.dim), dtype=np.float16)]
    for part, commit in enumerate(source.commits):
        start, share = source.starts[part], int(shares[part])
        if not share:
            continue
        order = np.random.default_rng([seed, commit.partition]).permutation(commit.rows)
        if without is not None:
            order = order[~np.isin(order + start, without)]
        gaps = commit.rows / filled[part]
        order = order[: share if gaps == 1 else math.ceil(1.1 * share * gaps) + 100]
        found, their = _gather(source, kind, part, order, filled[part])
        rows.append(found[:share] + start)
        vectors.append(their[:share])
    return np.concatenate(rows), np.concatenate(vectors)


def blocks(count: int) -> list[slice]:
    """[0, count) in slices of BLOCK rows."""
    return [slice(low, min(low + BLOCK, count)) for low in range(0, count, BLOCK)]
