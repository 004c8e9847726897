"""An embeddings folder of clip-retrieval: numbered files that belong together by their number, and no commits.

    img_emb/img_emb_<number>.npy, text_emb/text_emb_<number>.npy     float16 or float32 (n, d)
    metadata/metadata_<number>.parquet                               n rows

Each kind may be absent as a whole; a kind that is there must have every number. A folder of ours without its
`_clip_batch` reads likewise.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clip_batch.embeddings import metadata
from clip_batch.embeddings.reader import Embeddings
from clip_batch.embeddings.tables import Tables, without_metadata
from clip_batch.errors import CorruptError
from clip_batch.plan import paths
from clip_batch.storage.npy import read_npy_header
from clip_batch.storage.retry import corrupt_unless_unavailable
from clip_batch.storage.store import Store
from clip_batch.storage.transfer import file_version
from clip_batch.types import Commit, EncoderSpec, Partition, Plan

KINDS = {**dict.fromkeys(paths.VECTORS.values(), "npy"), paths.METADATA: "parquet"}
"""Folders, and the extension of their files."""

DTYPES = ("<f2", "<f4")
REMEDY = "write that file again, or move the files of its number away"


@dataclass(frozen=True)
class ClipRetrievalEmbeddings(Embeddings):
    """Parts without commits: theirs are made up, with a version tag of size and time in the place of each sha256."""

    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    remedy: ClassVar[str] = REMEDY

    tables: Tables = field(kw_only=True)

    def _count_captions(self, commit: Commit) -> tuple[int, int]:
        """See Embeddings. Where there are no captions at all, every text row must have a vector."""
        path = commit.file(paths.METADATA)
        if not path or not self.tables.has_captions(path):
            return commit.rows, commit.rows
        return metadata.count(self.store, path)

    def _captionless(self, commit: Commit) -> npt.NDArray[np.bool_]:
        path = commit.file(paths.METADATA)
        if not path or not self.tables.has_captions(path):
            return np.zeros(commit.rows, dtype=np.bool_)
        return metadata.without_caption(self.store, path)

    def _read_table(self, commit: Commit, start: int, stop: int) -> pa.Table:
        if path := commit.file(paths.METADATA):
            return self.tables.read(commit.partition, path, start, stop)
        where = self.store.display(next(iter(commit.files)))
        return without_metadata(commit.partition, where, start, stop)


class _Matrix(NamedTuple):
    """What the header of an npy file says (0 of a metadata file), and the version tag of the file."""

    rows: int
    dim: int
    bytes: int
    tag: str


def is_folder(store: Store) -> bool:
    """Whether a folder has embeddings but no plan of ours."""
    return not store.exists(paths.PLAN) and any(store.list(folder) for folder in paths.VECTORS.values())


def open_folder(store: Store, encoder: EncoderSpec) -> ClipRetrievalEmbeddings:
    """The parts of a folder that has no commits, made by an encoder that only the caller knows.

    Reads headers, not rows. CorruptError: a file is misnamed, missing, cut or not what its name says; kinds differ
    in rows, files in dimension; there is no row at all.
    """
    found = {folder: _numbered(store, folder, extension) for folder, extension in KINDS.items()}
    found = {folder: names for folder, names in found.items() if names}
    _check_numbers(store, found)
    numbers = sorted(set().union(*found.values()))
    files = [found[folder][number] for number in numbers for folder in found]
    with ThreadPoolExecutor(16) as pool:
        read = dict(zip(files, pool.map(lambda path: _look(store, path), files), strict=True))
    digest = hashlib.sha256(repr([(path, one.tag) for path, one in read.items()]).encode()).hexdigest()
    plan = Plan(tuple(Partition(number, ()) for number in numbers), encoder, digest=digest)
    commits = [
        _commit(store, plan, number, {names[number]: read[names[number]] for names in found.values()})
        for number in numbers
    ]
    filled = tuple(commit for commit in commits if commit.rows)
    _check_dimensions(store, filled)
    tables = Tables(store, sorted(found.get(paths.METADATA, {}).items()))
    for commit in commits:
        _check_metadata(store, commit, tables)
    starts = tuple(int(start) for start in np.cumsum([0, *(commit.rows for commit in filled)]))
    return ClipRetrievalEmbeddings(store, plan, filled, starts, (), False, tables=tables)


def _numbered(store: Store, folder: str, extension: str) -> dict[int, str]:
    """The files of a folder by their number."""
    found: dict[int, str] = {}
    for name in store.list(folder):
        if not name.endswith(f".{extension}") or name.startswith("."):
            continue
        path = f"{folder}/{name}"
        match = re.fullmatch(rf"{folder}_(\d+)(-[0-9a-f]{{8}})?\.{extension}", name)
        if not match:
            wanted = f"{folder}_<number>.{extension}"
            raise CorruptError(f"{store.display(path)} is not named {wanted}: rename it, or move it out of the folder")
        number = int(match[1])
        if number in found:
            raise CorruptError(f"{store.display(path)} has the number of {found[number]}: move the wrong one away")
        found[number] = path
    return found


def _check_numbers(store: Store, found: dict[str, dict[int, str]]) -> None:
    if not any(folder in found for folder in paths.VECTORS.values()):
        raise CorruptError(f"{store.url} has no img_emb/img_emb_<number>.npy nor text_emb: there is nothing to merge")
    for folder, names in found.items():
        for more in found.values():
            if alone := sorted(set(more) - set(names)):
                where = store.display(more[alone[0]])
                raise CorruptError(f"{where} has no counterpart in {folder}: copy it there, or move this one away")


def _look(store: Store, path: str) -> _Matrix:
    """The header of an npy file, checked against its size; of metadata only size and tag."""
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
    """Bytes of a file, and a tag that changes when it does, as far as the store tells."""
    if store.local:
        size, changed = store.size(path), str(store.modified(path))
    else:
        told, etag = file_version(store.remote(path))
        size, changed = told if told is not None else store.size(path), str(etag)
    return size, f"unverified {size} {changed}"


def _commit(store: Store, plan: Plan, number: int, files: dict[str, _Matrix]) -> Commit:
    """The commit that a part would have."""
    (first, made), *others = [(path, one) for path, one in files.items() if path.endswith(".npy")]
    for path, other in others:
        if (other.rows, other.dim) != (made.rows, made.dim):
            shapes = f"({other.rows}, {other.dim}), {first} is ({made.rows}, {made.dim})"
            raise CorruptError(f"{store.display(path)} is {shapes}: {REMEDY}")
    return Commit(
        partition=number,
        attempt="",
        rows=made.rows,
        dim=made.dim,
        encoder=plan.encoder.fingerprint,
        plan=plan.digest,
        files={path: {"bytes": one.bytes, "sha256": one.tag} for path, one in files.items()},
        shards={},
        failed={},
        warnings={},
        started=0.0,
        finished=0.0,
        worker="",
    )


def _check_metadata(store: Store, commit: Commit, tables: Tables) -> None:
    path = commit.file(paths.METADATA)
    if path and (rows := tables.rows(path)) != commit.rows:
        npy = next(iter(commit.files))
        raise CorruptError(f"{store.display(path)} has {rows} rows, {npy} has {commit.rows}: {REMEDY}")


def _check_dimensions(store: Store, commits: Sequence[Commit]) -> None:
    if not commits:
        raise CorruptError(f"{store.url} has no embedded row: there is nothing to merge")
    for commit in commits:
        if commit.dim != commits[0].dim:
            wrong, right = (next(iter(one.files)) for one in (commit, commits[0]))
            what = f"has {commit.dim} dimensions, {right} has {commits[0].dim}"
            raise CorruptError(f"{store.display(wrong)} {what}: merge folders of different encoders apart")
