"""The committed embeddings of OUT as one long matrix: rows in partition order, checked as they are read.

Only commits are trusted. Vectors are returned as they are stored, float16; `storage.npy.unit` scales
them to unit norm in float32 (float16 rounding moves a norm by up to 5e-4, enough to put a near
duplicate before the row itself).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from shlex import quote
from typing import IO, TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from clip_batch.embeddings import metadata
from clip_batch.embeddings.commits import read_commits
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
"""Rows that are converted to float32 at a time."""

NORM_TOLERANCE = 5e-3
"""How far the norm of a row may be from 1: float16 rounding needs 5e-4, normalising in bfloat16 4e-3."""


@dataclass(frozen=True)
class Embeddings:
    """All committed rows of OUT; part i has the rows [starts[i], starts[i + 1]).

    A kind is "image" or "text". A folder without commits is read by a subclass (see `embeddings.clip_retrieval`).
    """

    dtypes: ClassVar[tuple[str, ...]] = ("<f2",)
    """The dtypes that npy files may have."""

    remedy: ClassVar[str] = "run clip-batch verify, then repair"
    """How every CorruptError ends."""

    store: Store
    plan: Plan
    commits: tuple[Commit, ...]
    starts: tuple[int, ...]
    missing: tuple[int, ...]
    verified: bool = True
    """Whether the commits carry the sha256 of their files."""
    empty: tuple[Commit, ...] = ()
    """The commits of partitions that have failures and no row; `commits` has only those with rows."""

    @property
    def rows(self) -> int:
        """The number of rows of all parts."""
        return self.starts[-1]

    @property
    def dim(self) -> int:
        """The dimension of the vectors."""
        return self.commits[0].dim

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of vectors, "image" and "text", that every part has."""
        return tuple(kind for kind, folder in paths.VECTORS.items() if all(part.file(folder) for part in self.commits))

    def only(self, commits: Sequence[Commit]) -> Self:
        """The rows of some of the parts alone."""
        starts = tuple(int(start) for start in np.cumsum([0, *(commit.rows for commit in commits)]))
        return replace(self, commits=tuple(commits), starts=starts)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Commit, int, int]]:
        """(commit, first, last + 1 within its part) of the parts that hold rows [start, stop)."""
        for commit, first in zip(self.commits, self.starts, strict=False):
            low, high = max(start - first, 0), min(stop - first, commit.rows)
            if low < high:
                yield commit, low, high

    def read_vectors(self, kind: str, start: int, stop: int) -> Half:
        """Rows [start, stop) as float16 (n, dim); their values are not checked (see `check_rows`)."""
        out = np.empty((stop - start, self.dim), dtype=np.float16)
        done = 0
        for commit, low, high in self.pieces(start, stop):
            path, header = self._path(commit, paths.VECTORS[kind]), self._header(commit, kind)
            width = header.dtype.itemsize * commit.dim
            with self.store.open(path) as file:
                file.seek(header.offset + low * width)
                data = file.read((high - low) * width)
            if len(data) != (high - low) * width:
                raise CorruptError(f"{self.store.display(path)} ended early: {self.remedy}")
            with np.errstate(over="ignore"):  # `check_rows` finds what is too large for float16
                out[done : done + high - low] = np.frombuffer(data, dtype=header.dtype).reshape(-1, commit.dim)
            done += high - low
        return out

    def read_metadata(self, start: int, stop: int) -> Iterator[pa.Table]:
        """Metadata rows [start, stop), part by part, with their lineage: columns `partition` and `row` (int32)."""
        for commit, low, high in self.pieces(start, stop):
            yield self._read_table(commit, low, high)

    @property
    def metadata_schema(self) -> pa.Schema:
        """The columns of the tables of `read_metadata`."""
        fields = metadata.metadata_schema(self.plan.fields)
        return metadata.with_lineage(fields.empty_table(), 0, 0).schema

    def scan_metadata(
        self, commit: Commit, columns: Sequence[str], keep: Callable[[IO[bytes]], Sequence[int]] | None
    ) -> Iterator[pa.Table]:
        """Some metadata columns of a part, row group by row group, with the lineage columns.

        `keep` is given the open Parquet file, and says which row groups to read.
        """
        yield from metadata.read_groups(self.store, self._path(commit, paths.METADATA), commit.partition, columns, keep)

    def read_captionless(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Which of the rows [start, stop) have no caption, so that their text vector may be all zero: (n,)."""
        parts = [self._captionless(commit)[low:high] for commit, low, high in self.pieces(start, stop)]
        return np.concatenate([np.empty(0, dtype=bool), *parts])

    def gather(self, kind: str, rows: Rows) -> Half:
        """Rows (n,), ascending, as float16 (n, dim); their values are not checked."""
        out = np.empty((len(rows), self.dim), dtype=np.float16)
        cuts = np.searchsorted(rows, self.starts)
        for commit, first, low, high in zip(self.commits, self.starts, cuts, cuts[1:], strict=False):
            if low < high:
                out[low:high] = self._gather_part(commit, kind, rows[low:high] - first)
        return out

    def draw(
        self, kind: str, filled: Sequence[int], count: int, seed: int, without: Rows | None = None
    ) -> tuple[Rows, Half]:
        """A random sample of `count` rows, except those in `without`: (rows (n,), vectors float16 (n, dim)).

        Each part gives its share. `filled` counts the rows of each part that have a vector of that kind; from a part
        with gaps more rows are drawn, and its zero rows are dropped. A part's random order depends on the seed and its
        partition alone, so the sample does not depend on the number of processes or on the parts before it.
        CorruptError where a drawn row is not finite and of unit norm.
        """
        return self.draw_shares(kind, filled, shares(filled, count), seed, without)

    def draw_shares(
        self, kind: str, filled: Sequence[int], shares: Sequence[int], seed: int, without: Rows | None = None
    ) -> tuple[Rows, Half]:
        """As `draw`, where `shares` says how many rows each part gives."""
        rows, vectors = [np.empty(0, dtype=np.int64)], [np.empty((0, self.dim), dtype=np.float16)]
        for part, commit in enumerate(self.commits):
            start, share = self.starts[part], shares[part]
            if not share:
                continue
            order = np.random.default_rng([seed, commit.partition]).permutation(commit.rows)
            if without is not None:
                order = order[~np.isin(order + start, without)]
            gaps = commit.rows / filled[part]
            order = order[: share if gaps == 1 else math.ceil(1.1 * share * gaps) + 100]
            part_rows, part_vectors = self._draw_part(part, kind, order, filled[part])
            rows.append(part_rows[:share] + start)
            vectors.append(part_vectors[:share])
        return np.concatenate(rows), np.concatenate(vectors)

    def check_files(self, kinds: Sequence[str]) -> list[int]:
        """The number of captioned rows of each part, after a check of every part's headers, sizes and row counts.

        CorruptError names the first file that is wrong.
        """

        def check(commit: Commit) -> int:
            for kind in kinds:
                self._header(commit, kind)
            rows, captioned = self._count_captions(commit)
            if rows != commit.rows:
                path = self.store.display(self._path(commit, paths.METADATA))
                raise CorruptError(f"{path} has {rows} rows, its commit says {commit.rows}: {self.remedy}")
            return captioned

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(check, self.commits))

    def check_rows(
        self, kind: str, start: int, vectors: Half, captionless: npt.NDArray[np.bool_] | None = None
    ) -> None:
        """Check that vectors (n, dim), the rows from `start` on, are finite and of unit norm.

        Rows (n,) that are `captionless` may be all zero. CorruptError names the file and the row that is wrong.
        """
        for low in range(0, len(vectors), BLOCK):
            norms = norms_of(vectors[low : low + BLOCK])
            bad = ~(np.abs(norms - 1) <= NORM_TOLERANCE)
            if captionless is not None:
                bad &= ~((norms == 0) & captionless[low : low + BLOCK])
            if bad.any():
                at = int(np.flatnonzero(bad)[0])
                commit, row, _ = next(self.pieces(start + low + at, start + low + at + 1))
                path = self.store.display(self._path(commit, paths.VECTORS[kind]))
                hint = " though it has a caption" if kind == "text" and norms[at] == 0 else ""
                norm = np.linalg.norm(vectors[low + at].astype(np.float32))  # says nan and inf
                raise CorruptError(f"{path}: row {row} has norm {norm:.4g}{hint}, not 1: {self.remedy}")

    def _count_captions(self, commit: Commit) -> tuple[int, int]:
        """(rows, rows with a caption) of a part's metadata."""
        return metadata.count(self.store, self._path(commit, paths.METADATA))

    def _captionless(self, commit: Commit) -> npt.NDArray[np.bool_]:
        """Which rows (n,) of a part have no caption."""
        return metadata.without_caption(self.store, self._path(commit, paths.METADATA))

    def _read_table(self, commit: Commit, start: int, stop: int) -> pa.Table:
        """Metadata rows [start, stop) of a part, with their lineage."""
        return metadata.read_rows(self.store, self._path(commit, paths.METADATA), commit.partition, start, stop)

    def _path(self, commit: Commit, folder: str) -> str:
        """The file of a part in a folder; CorruptError if its commit names none."""
        if (path := commit.file(folder)) is None:
            where = f"{self.store.url}: the commit of partition {commit.partition}"
            raise CorruptError(f"{where} names no {folder} file: {self.remedy}")
        return path

    def _header(self, commit: Commit, kind: str) -> NpyHeader:
        """The header of a part's npy file, checked against its commit and the file's size."""
        path = self._path(commit, paths.VECTORS[kind])
        where = self.store.display(path)
        with corrupt_unless_unavailable(f"{where} is not a readable npy file", self.remedy, ValueError):
            with self.store.open(path) as file:
                header = read_npy_header(file)
            size = self.store.size(path)
        if header.shape != (commit.rows, commit.dim) or not header.is_matrix(self.dtypes):
            committed = f"float16 {(commit.rows, commit.dim)}"
            raise CorruptError(f"{where} is {header}, the commit says {committed}: {self.remedy}")
        if size != header.file_size:
            raise CorruptError(f"{where} is cut: it has {size} bytes for {header}: {self.remedy}")
        return header

    @contextmanager
    def mapped(self, commit: Commit, kind: str) -> Iterator[npt.NDArray[Any]]:
        """The matrix of a part, memory-mapped, so that only the pages of rows that are used are read."""
        header = self._header(commit, kind)
        with self.store.fetch(self._path(commit, paths.VECTORS[kind])) as local:
            yield map_matrix(local, header)

    def _gather_part(self, commit: Commit, kind: str, rows: Rows) -> Half:
        """Rows (n,), ascending, of a part as float16 (n, dim)."""
        with self.mapped(commit, kind) as matrix, np.errstate(over="ignore"):
            return np.asarray(matrix[rows], dtype=np.float16)

    def _draw_part(self, part: int, kind: str, order: Rows, captioned: int) -> tuple[Rows, Half]:
        """(rows, vectors) of a part in a random `order` (m,) of its row numbers, without zero rows."""
        commit = self.commits[part]
        rows = np.sort(order)
        vectors = self._gather_part(commit, kind, rows)
        has_vector = filled(vectors)
        if kind == "image" or captioned == commit.rows:
            has_vector[:] = True
        bad = ~(np.abs(norms_of(vectors) - 1) <= NORM_TOLERANCE) & has_vector
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            self.check_rows(kind, self.starts[part] + int(rows[at]), vectors[at : at + 1])
        places = np.searchsorted(rows, order)
        places = places[has_vector[places]]
        return rows[places], vectors[places]


def open_embeddings(store: Store, plan: Plan, allow_partial: bool = False) -> Embeddings:
    """The committed parts of OUT, without reading a row.

    IncompleteError: partitions are not committed. CorruptError: commits of another plan, encoder or
    dimension, or no row at all.
    """
    # Another process may have extended the plan and embedded more since it was loaded.
    commits = {number: commit for number, commit in read_commits(store).items() if number < len(plan.partitions)}
    missing = tuple(number for number in range(len(plan.partitions)) if number not in commits)
    if missing and not allow_partial:
        raise IncompleteError(
            f"{store.url} lacks partitions {format_numbers(missing)} of {len(plan.partitions)}: "
            f"run clip-batch worker --output {quote(store.url)} --partitions {format_numbers(missing)}, "
            "or merge with --allow-partial"
        )
    nonempty = tuple(commits[number] for number in sorted(commits) if commits[number].rows)
    empty = tuple(commits[number] for number in sorted(commits) if commits[number].empty)
    for commit in nonempty:
        for what, committed, expected in (
            ("plan", commit.plan, plan.generation(commit.partition).digest),
            ("encoder", commit.encoder, plan.encoder.fingerprint),
            ("dimension", commit.dim, nonempty[0].dim),
        ):
            if committed != expected:
                raise CorruptError(
                    f"{store.url}: partition {commit.partition} has {what} {committed}, not {expected}: "
                    f"remove its commit and run clip-batch embed --output {quote(store.url)}"
                )
    if not nonempty:
        why = f" (partition {empty[0].partition}: {empty[0].empty})" if empty else ""
        raise CorruptError(f"{store.url} has no embedded row{why}: there is nothing to merge; see clip-batch status")
    starts = tuple(int(start) for start in np.cumsum([0, *(commit.rows for commit in nonempty)]))
    return Embeddings(store, plan, nonempty, starts, missing, empty=empty)


def shares(filled: Sequence[int], count: int) -> list[int]:
    """How many of `count` rows each part gives, as many as its share of all; fewer where there are not so many."""
    total = sum(filled)
    ends = [min(count, total) * int(end) // max(total, 1) for end in np.cumsum([0, *filled])]
    return [stop - start for start, stop in pairwise(ends)]


def blocks(count: int) -> list[slice]:
    """[0, count) in slices of BLOCK rows."""
    return [slice(low, min(low + BLOCK, count)) for low in range(0, count, BLOCK)]
