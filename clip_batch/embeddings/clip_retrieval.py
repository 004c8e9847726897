"""Reads an embeddings folder of clip-retrieval: files that belong together by their number, without commits.

    img_emb/img_emb_<number>.npy, text_emb/text_emb_<number>.npy     float16 or float32 (n, d)
    metadata/metadata_<number>.parquet                               n rows

A kind of file may be absent as a whole; otherwise it must have every number. A folder that clip-batch wrote and that
has lost its `_clip_batch` can be read in the same way.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clip_batch.embeddings import metadata
from clip_batch.embeddings.reader import BLOCK, Embeddings
from clip_batch.embeddings.tables import Tables, without_metadata
from clip_batch.errors import CorruptError
from clip_batch.plan import paths
from clip_batch.storage.npy import read_npy_header
from clip_batch.storage.retry import corrupt_unless_unavailable
from clip_batch.storage.store import Store
from clip_batch.storage.transfer import file_version
from clip_batch.types import Commit, EncoderSpec, Partition, Plan

KINDS = {**dict.fromkeys(paths.VECTORS.values(), "npy"), paths.METADATA: "parquet"}
"""The folders, and the extension of the files in each."""

DTYPES = ("<f2", "<f4")
REMEDY = "write that file again, or move the files of its number away"


@dataclass(frozen=True)
class ClipRetrievalEmbeddings(Embeddings):
    """Embeddings whose commits are made up from their files; a tag of size and time stands for each sha256."""

    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    remedy: ClassVar[str] = REMEDY

    tables: Tables = field(kw_only=True)

    def _count_captions(self, commit: Commit) -> tuple[int, int]:
        """As in `Embeddings`. Without a caption column all rows count as captioned, so each must have a text vector."""
        path = commit.file(paths.METADATA)
        if not path or not self.tables.has_captions(path):
            return commit.rows, commit.rows
        return metadata.count(self.store, path)

    def _captionless(self, commit: Commit) -> npt.NDArray[np.bool_]:
        path = commit.file(paths.METADATA)
        if not path or not self.tables.has_captions(path):
            return np.zeros(commit.rows, dtype=np.bool_)
        return metadata.without_caption(self.store, path)

    @property
    def metadata_schema(self) -> pa.Schema:
        """As in `Embeddings`."""
        return self.tables.schema

    def scan_metadata(
        self, commit: Commit, columns: Sequence[str], keep: Callable[[IO[bytes]], Sequence[int]] | None
    ) -> Iterator[pa.Table]:
        """As in `Embeddings`, but in blocks of rows, all of which are read."""
        for start in range(0, commit.rows, BLOCK):
            yield self._read_table(commit, start, min(start + BLOCK, commit.rows))

    def _read_table(self, commit: Commit, start: int, stop: int) -> pa.Table:
        if path := commit.file(paths.METADATA):
            return self.tables.read(commit.partition, path, start, stop)
        where = self.store.display(next(iter(commit.files)))
        return without_metadata(commit.partition, where, start, stop)


class _Matrix(NamedTuple):
    """The shape of an npy file (0, 0 for a metadata file), its size, and its version tag."""

    rows: int
    dim: int
    bytes: int
    tag: str


def is_folder(store: Store) -> bool:
    """Whether a folder has embeddings but no plan."""
    return not store.exists(paths.PLAN) and any(store.list(folder) for folder in paths.VECTORS.values())


def open_folder(store: Store, encoder: EncoderSpec) -> ClipRetrievalEmbeddings:
    """Open a folder that has no commits; `encoder` is the one that made it, which only the caller knows.

    Reads headers, not rows. CorruptError: a file is misnamed, missing, truncated or of another format; the files of a
    number differ in rows, or files in dimension; or there is no row at all.
    """
    folders = {folder: _numbered(store, folder, extension) for folder, extension in KINDS.items()}
    folders = {folder: names for folder, names in folders.items() if names}
    _check_numbers(store, folders)
    numbers = sorted(set().union(*folders.values()))
    names = [folders[folder][number] for number in numbers for folder in folders]
    with ThreadPoolExecutor(16) as pool:
        files = dict(zip(names, pool.map(lambda name: _read_file(store, name), names), strict=True))
    digest = hashlib.sha256(repr([(name, file.tag) for name, file in files.items()]).encode()).hexdigest()
    plan = Plan(tuple(Partition(number, ()) for number in numbers), encoder, digest=digest)
    commits = [
        _commit(store, plan, number, {part[number]: files[part[number]] for part in folders.values()})
        for number in numbers
    ]
    nonempty = tuple(commit for commit in commits if commit.rows)
    _check_dimensions(store, nonempty)
    tables = Tables(store, sorted(folders.get(paths.METADATA, {}).items()))
    for commit in commits:
        _check_metadata(store, commit, tables)
    starts = tuple(int(start) for start in np.cumsum([0, *(commit.rows for commit in nonempty)]))
    return ClipRetrievalEmbeddings(store, plan, nonempty, starts, (), False, tables=tables)


def _numbered(store: Store, folder: str, extension: str) -> dict[int, str]:
    """The files of a folder, by number."""
    numbered: dict[int, str] = {}
    for name in store.list(folder):
        if not name.endswith(f".{extension}") or name.startswith("."):
            continue
        path = f"{folder}/{name}"
        match = re.fullmatch(rf"{folder}_(\d+)(-[0-9a-f]{{8}})?\.{extension}", name)
        if not match:
            expected = f"{folder}_<number>.{extension}"
            raise CorruptError(
                f"{store.display(path)} is not named {expected}: rename it, or move it out of the folder"
            )
        number = int(match[1])
        if number in numbered:
            raise CorruptError(f"{store.display(path)} has the number of {numbered[number]}: move the wrong one away")
        numbered[number] = path
    return numbered


def _check_numbers(store: Store, folders: dict[str, dict[int, str]]) -> None:
    """CorruptError if there are no vectors, or if a number is missing in one of the folders."""
    if not any(folder in folders for folder in paths.VECTORS.values()):
        raise CorruptError(f"{store.url} has no img_emb/img_emb_<number>.npy nor text_emb: there is nothing to merge")
    for folder, names in folders.items():
        for others in folders.values():
            if alone := sorted(set(others) - set(names)):
                where = store.display(others[alone[0]])
                raise CorruptError(f"{where} has no counterpart in {folder}: copy it there, or move this one away")


def _read_file(store: Store, path: str) -> _Matrix:
    """Read the header of an npy file and check it against the file's size; of metadata, only size and tag are read."""
    size, tag = version_tag(store, path)
    if not path.endswith(".npy"):
        return _Matrix(0, 0, size, tag)
    where = store.display(path)
    with (
        corrupt_unless_unavailable(f"{where} is not a readable npy file", REMEDY, ValueError),
        store.open(path) as file,
    ):
        header = read_npy_header(file)
    if not header.is_matrix(DTYPES):
        raise CorruptError(f"{where} is {header}, not float16 or float32 (n, d): {REMEDY}")
    if size != header.file_size:
        raise CorruptError(f"{where} has {size} bytes, {header} takes {header.file_size}: {REMEDY}")
    rows, dim = header.shape
    return _Matrix(rows, dim, size, tag)


def version_tag(store: Store, path: str) -> tuple[int, str]:
    """(bytes, tag) of a file; the tag changes when the file does, as far as the store says so."""
    if store.local:
        size, changed = store.size(path), str(store.modified(path))
    else:
        known_size, etag = file_version(store.remote(path))
        size, changed = store.size(path) if known_size is None else known_size, str(etag)
    return size, f"unverified {size} {changed}"


def _commit(store: Store, plan: Plan, number: int, files: dict[str, _Matrix]) -> Commit:
    """The commit that clip-batch would have written for a part; its files must agree in rows and dimension."""
    (first, matrix), *others = [(path, file) for path, file in files.items() if path.endswith(".npy")]
    for path, other in others:
        if (other.rows, other.dim) != (matrix.rows, matrix.dim):
            shapes = f"({other.rows}, {other.dim}), {first} is ({matrix.rows}, {matrix.dim})"
            raise CorruptError(f"{store.display(path)} is {shapes}: {REMEDY}")
    return Commit(
        partition=number,
        attempt="",
        rows=matrix.rows,
        dim=matrix.dim,
        encoder=plan.encoder.fingerprint,
        plan=plan.digest,
        files={path: {"bytes": file.bytes, "sha256": file.tag} for path, file in files.items()},
        shards={},
        failed={},
        warnings={},
        started=0.0,
        finished=0.0,
        worker="",
    )


def _check_metadata(store: Store, commit: Commit, tables: Tables) -> None:
    """CorruptError if the metadata of a part has other rows than its vectors."""
    path = commit.file(paths.METADATA)
    if path and (rows := tables.rows(path)) != commit.rows:
        npy = next(iter(commit.files))
        raise CorruptError(f"{store.display(path)} has {rows} rows, {npy} has {commit.rows}: {REMEDY}")


def _check_dimensions(store: Store, commits: Sequence[Commit]) -> None:
    """CorruptError if there is no part with rows, or if parts differ in dimension."""
    if not commits:
        raise CorruptError(f"{store.url} has no embedded row: there is nothing to merge")
    for commit in commits:
        if commit.dim != commits[0].dim:
            wrong, right = (next(iter(part.files)) for part in (commit, commits[0]))
            what = f"has {commit.dim} dimensions, {right} has {commits[0].dim}"
            raise CorruptError(f"{store.display(wrong)} {what}: merge folders of different encoders apart")
