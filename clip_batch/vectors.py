"""The committed embeddings of OUT as one long matrix: rows in partition order, checked as they are read.

Only commits are trusted. float16 rows are scaled to unit norm in float32 (float16 rounding moves a
norm by up to 5e-4, enough to put a near duplicate before the row itself).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clip_batch import metadata
from clip_batch.errors import CorruptError, IncompleteError
from clip_batch.part import read_commits
from clip_batch.store import Store, Unavailable
from clip_batch.types import Commit, Plan, format_numbers

if TYPE_CHECKING:
    import pyarrow as pa

Half = npt.NDArray[np.float16]
Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

FOLDER = {"image": "img_emb", "text": "text_emb"}
BLOCK = 65_536
"""Rows converted to float32 at a time."""

NORM_TOLERANCE = 5e-3
"""Of a row's norm: float16 rounding needs 5e-4, normalising in bfloat16 4e-3."""


@dataclass(frozen=True)
class Embeddings:
    """All committed rows of OUT; part i has the rows [starts[i], starts[i + 1])."""

    store: Store
    plan: Plan
    commits: tuple[Commit, ...]
    starts: tuple[int, ...]
    missing: tuple[int, ...]

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
            _data_start(source.store, commit, kind)
        rows, captioned = metadata.count(source.store, path := _path(source.store, commit, "metadata"))
        if rows != commit.rows:
            raise CorruptError(f"{source.store.display(path)} has {rows} rows, its commit says {commit.rows}: {_MEND}")
        return captioned

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(check, source.commits))


_MEND = "run clip-batch verify, then repair"


def _path(store: Store, commit: Commit, folder: str) -> str:
    if (path := commit.file(folder)) is None:
        raise CorruptError(f"{store.url}: the commit of partition {commit.partition} names no {folder} file: {_MEND}")
    return path


def _data_start(store: Store, commit: Commit, kind: str) -> int:
    """Where the matrix starts in a part's npy file, whose header and size are checked."""
    path = _path(store, commit, FOLDER[kind])
    try:
        with store.open(path) as file:
            shape, fortran, dtype = npy_header(file)
            start = file.tell()
        size = store.size(path)
    except (Unavailable, PermissionError):  # that is not the file's fault
        raise
    except (OSError, ValueError) as error:
        raise CorruptError(f"{store.display(path)} is not a readable npy file ({error}): {_MEND}") from None
    wanted = (commit.rows, commit.dim)
    if shape != wanted or dtype != np.dtype("<f2") or fortran:
        found = f"{dtype} {shape}{' in Fortran order' if fortran else ''}"
        raise CorruptError(f"{store.display(path)} is {found}, the commit says float16 {wanted}: {_MEND}")
    if size != start + 2 * commit.rows * commit.dim:
        raise CorruptError(f"{store.display(path)} is cut: it has {size} bytes for {dtype} {shape}: {_MEND}")
    return start


_parsing = threading.Lock()


def npy_header(file: IO[bytes]) -> Any:
    """(shape, Fortran order, dtype) of an npy file; ValueError if it is none."""
    npy: Any = np.lib.format
    with _parsing:  # numpy parses it as Python, and threads that do so at once can break Python 3.11 (gh-106905)
        return npy.read_array_header_1_0(file) if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0(file)


def open_matrix(path: str) -> Half:
    """A local npy file of float16 rows (n, d), memory-mapped, read only. ValueError if it is none."""
    with open(path, "rb") as file:
        shape, _, dtype = npy_header(file)
        return np.memmap(file, dtype=dtype, mode="r", offset=file.tell(), shape=shape)


def read_vectors(source: Embeddings, kind: str, start: int, stop: int) -> Half:
    """Rows [start, stop) as float16 (n, dim), not checked: see `check_rows`."""
    out = np.empty((stop - start, source.dim), dtype=np.float16)
    done = 0
    for commit, low, high in source.pieces(start, stop):
        path, width = _path(source.store, commit, FOLDER[kind]), 2 * commit.dim
        with source.store.open(path) as file:
            file.seek(_data_start(source.store, commit, kind) + low * width)
            data = file.read((high - low) * width)
        if len(data) != (high - low) * width:
            raise CorruptError(f"{source.store.display(path)} ended early: {_MEND}")
        out[done : done + high - low] = np.frombuffer(data, dtype="<f2").reshape(-1, commit.dim)
        done += high - low
    return out


def read_metadata(source: Embeddings, start: int, stop: int) -> pa.Table:
    """Metadata rows [start, stop), with their lineage: columns `partition` and `row` (int32)."""
    tables = [
        metadata.read_rows(source.store, _path(source.store, commit, "metadata"), commit.partition, low, high)
        for commit, low, high in source.pieces(start, stop)
    ]
    return metadata.concat(tables, source.store.url)


def check_rows(
    source: Embeddings, kind: str, start: int, vectors: Half, empty: npt.NDArray[np.bool_] | None = None
) -> None:
    """CorruptError, naming file and row, where a row of vectors (n, dim) from `start` on is not finite and unit.

    `empty` (n,) says which rows may be all zero (text rows without a caption).
    """
    for low in range(0, len(vectors), BLOCK):
        norms = _norms(vectors[low : low + BLOCK])
        bad = ~(np.abs(norms - 1) <= NORM_TOLERANCE)
        if empty is not None:
            bad &= ~((norms == 0) & empty[low : low + BLOCK])
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            commit, row, _ = next(source.pieces(start + low + at, start + low + at + 1))
            path = source.store.display(_path(source.store, commit, FOLDER[kind]))
            hint = " though it has a caption" if kind == "text" and norms[at] == 0 else ""
            raise CorruptError(f"{path}: row {row} has norm {norms[at]:.4g}{hint}, not 1: {_MEND}")


def _norms(vectors: Half) -> npt.NDArray[np.float32]:
    exact = vectors.astype(np.float32)
    norms: npt.NDArray[np.float32] = np.sqrt(np.einsum("nd,nd->n", exact, exact))
    return norms


def unit(vectors: Half) -> Vectors:
    """float32 (n, dim) of unit norm; zero rows stay zero."""
    exact = vectors.astype(np.float32)
    norms = _norms(vectors)[:, None]
    np.divide(exact, norms, out=exact, where=norms > 0)
    return exact


def _gather(source: Embeddings, kind: str, part: int, order: Rows, captioned: int) -> tuple[Rows, Half]:
    """Rows of a part in a random `order` (m,) of its row numbers: (rows, their vectors), zero rows left out.

    Memory-mapped and read in file order. CorruptError where a drawn row is not finite and unit.
    """
    commit = source.commits[part]
    path, start = _path(source.store, commit, FOLDER[kind]), _data_start(source.store, commit, kind)
    in_file_order = np.sort(order)
    with source.store.fetch(path) as local:
        mapped = np.memmap(local, dtype="<f2", mode="r", offset=start, shape=(commit.rows, commit.dim))
        vectors = np.asarray(mapped[in_file_order])
        del mapped
    filled = np.any(vectors != 0, axis=1)
    if kind == "image" or captioned == commit.rows:
        filled[:] = True
    bad = ~(np.abs(_norms(vectors) - 1) <= NORM_TOLERANCE) & filled
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        check_rows(source, kind, source.starts[part] + int(in_file_order[at]), vectors[at : at + 1])
    back = np.searchsorted(in_file_order, order)
    keep = back[filled[back]]
    return in_file_order[keep], vectors[keep]


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
