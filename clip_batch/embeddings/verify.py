"""verify --output: proves that every partition is committed and that its files are the committed ones."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from clip_batch.embeddings.commits import read_commits
from clip_batch.errors import CorruptError
from clip_batch.plan import paths
from clip_batch.plan.plan import load_plan
from clip_batch.samples import read_slice
from clip_batch.storage.npy import open_matrix, read_npy_header
from clip_batch.storage.retry import corrupt_unless_unavailable
from clip_batch.storage.store import Store
from clip_batch.types import Commit, Plan, Sample, StoredFile


@dataclass
class VerifyReport:
    """What `verify` found: a problem names a partition (or an index shard) and what is wrong with it."""

    checked: int = 0
    rows: int = 0
    failed: int = 0
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_output(store: Store, deep: bool = False, options: dict[str, Any] | None = None) -> VerifyReport:
    """Prove that every partition of a plan is committed and that its files are what was committed.

    Quick: presence and size of each file, rows in each header. Deep: sha256 of every byte, unit norm
    of every row, and the input read again: each sample is a row or a failure, in the same order.
    """
    plan = load_plan(store)
    commits = read_commits(store)
    report = VerifyReport(checked=len(plan.partitions))

    def check(number: int) -> str | None:
        if number not in commits:
            return "not committed"
        return _check_commit(store, plan, commits[number], deep, options)

    with ThreadPoolExecutor(8) as pool:
        found = pool.map(check, range(len(plan.partitions)))
        report.problems = {plan.name(number): text for number, text in enumerate(found) if text}
    report.rows = sum(commit.rows for commit in commits.values())
    report.failed = sum(sum(commit.failed.values()) for commit in commits.values())
    return report


def check_file(store: Store, name: str, stored: StoredFile, deep: bool) -> str | None:
    """Presence and size of a file, and with `deep` its sha256."""
    try:
        size = store.size(name)
    except FileNotFoundError:
        return f"{name} is missing"
    if size != stored["bytes"]:
        return f"{name} has {size} bytes, committed were {stored['bytes']}"
    if deep and store.digest(name) != stored["sha256"]:
        return f"{name} is not what was committed (sha256 differs)"
    return None


def _check_commit(store: Store, plan: Plan, commit: Commit, deep: bool, options: dict[str, Any] | None) -> str | None:
    if commit.plan != plan.digest:
        return f"committed under another plan ({commit.plan[:12]})"
    if commit.encoder != plan.encoder.fingerprint:
        return f"embedded by another encoder ({commit.encoder})"
    for name, stored in commit.files.items():
        if problem := check_file(store, name, stored, deep):
            return problem
    try:
        problem = _check_rows(store, commit)
    except CorruptError as error:
        return str(error)
    if deep and not problem:
        problem = _check_vectors(store, commit) or _check_input(store, plan, commit, options)
    return problem


def _check_rows(store: Store, commit: Commit) -> str | None:
    from clip_batch.storage.arrow import ParquetFile

    if not commit.rows:
        return None
    for folder in _folders(commit):
        name = commit.file(folder) or ""
        with _readable(name), store.open(name) as file:
            header = read_npy_header(file)
        if header.shape != (commit.rows, commit.dim) or not header.is_matrix(["<f2"]):
            return f"{name} holds {header}, committed were {commit.rows} rows of {commit.dim}"
    name = commit.file(paths.METADATA) or ""
    with _readable(name), store.open(name) as file:
        rows = ParquetFile(file).metadata.num_rows
    return None if rows == commit.rows else f"{name} holds {rows} rows, committed were {commit.rows}"


def _readable(name: str) -> AbstractContextManager[None]:
    return corrupt_unless_unavailable(f"{name} cannot be read", "run clip-batch repair", ValueError)


def _folders(commit: Commit) -> list[str]:
    """The folders of a part's vectors; a model without a text side leaves none of texts."""
    return [folder for folder in paths.VECTORS.values() if folder == paths.VECTORS["image"] or commit.file(folder)]


def _check_vectors(store: Store, commit: Commit) -> str | None:
    import numpy as np

    if not commit.rows:
        return None
    for folder in _folders(commit):
        name = commit.file(folder) or ""
        with store.fetch(name) as path:
            vectors = open_matrix(path)
            for start in range(0, commit.rows, 65_536):
                norms = np.linalg.norm(vectors[start : start + 65_536].astype(np.float32), axis=1)
                fine = np.abs(norms - 1) < 5e-3
                if folder == paths.VECTORS["text"]:
                    fine |= norms == 0
                if not fine.all():
                    row = int(start + np.flatnonzero(~fine)[0])
                    return f"{name} row {row} has norm {norms[row - start]:.4f}, not 1"
    return None


def _check_input(store: Store, plan: Plan, commit: Commit, options: dict[str, Any] | None) -> str | None:
    """Every sample of the input is a row or a failure row, in the input's order."""
    expected = Counter[tuple[str | None, str, int | None]]()
    order: list[tuple[str | None, str, int | None]] = []
    for piece in plan.partitions[commit.partition].slices:
        for item in read_slice(piece, plan, options):
            identity = (item.key, item.shard, item.offset)
            expected[identity] += 1
            if isinstance(item, Sample):
                order.append(identity)
    embedded = _identities(store, commit.file(paths.METADATA))
    failed = _identities(store, commit.file(paths.FAILURES))
    if expected != Counter(embedded) + Counter(failed):
        missing = expected - Counter(embedded) - Counter(failed)
        more = Counter(embedded) + Counter(failed) - expected
        return f"rows and input differ: {sum(missing.values())} samples are nowhere, {sum(more.values())} rows too many"
    rows = set(embedded)
    if [identity for identity in order if identity in rows] != embedded:
        return "rows are not in the order of the input"
    return None


def _identities(store: Store, name: str | None) -> list[tuple[str | None, str, int | None]]:
    from clip_batch.storage.arrow import ParquetFile

    if name is None:
        return []
    with store.open(name) as file:
        columns = ParquetFile(file).read(["key", "shard", "offset"])
    return list(zip(*(column.to_pylist() for column in columns.columns), strict=True))
