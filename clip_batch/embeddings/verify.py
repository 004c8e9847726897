"""verify --output: proof that every partition is committed, and that its files are those that were committed."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from shlex import quote
from typing import Any

from clip_batch.config import html
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.renewal import PresentInput, present_input
from clip_batch.errors import CorruptError
from clip_batch.plan import paths
from clip_batch.plan.plan import load_plan
from clip_batch.plan.state import newest
from clip_batch.samples import read_slice
from clip_batch.storage.npy import open_matrix, read_npy_header
from clip_batch.storage.retry import corrupt_unless_unavailable
from clip_batch.storage.store import Store
from clip_batch.types import Commit, PassedOver, Plan, Sample, StoredFile


@dataclass
class VerifyReport:
    """The result of `verify`: how many partitions (or index shards) were checked, and their rows and failed samples.

    `passed_over` counts the files of the input that are part of no row and of no failure, by extension. `problems` maps
    the name of each partition (or index shard) that is not sound to what is wrong with it. `empty` maps the name of
    each partition that was committed without a row to the reason; it is sound, and `repair` leaves it. `outdated` are
    those with a problem that are sound, but whose input is not what was embedded. Of an index, `removed` counts the
    rows that were removed, and `searched` those of them that were searched for.
    """

    checked: int = 0
    rows: int = 0
    failed: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)
    empty: dict[str, str] = field(default_factory=dict)
    removed: int = 0
    searched: int = 0
    outdated: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def _repr_html_(self) -> str:
        return html.table({"ok": self.ok, **asdict(self)})


def verify_output(store: Store, deep: bool = False, options: dict[str, Any] | None = None) -> VerifyReport:
    """Prove that every partition of a plan is committed, and that its files are those that were committed.

    Compares the plan and the encoder of each commit, the size of each file and the rows in its header. `deep` also
    compares the sha256 of each file, checks that every row has unit norm, and reads the input again (with `options`):
    each of its samples must be a row or a failure, in the same order. Input that is not what was embedded is named.
    """
    plan = load_plan(store)
    commits = {number: commit for number, commit in read_commits(store).items() if number < len(plan.partitions)}
    report = VerifyReport(checked=len(plan.partitions))
    present = present_input(store, plan, commits) if deep else PresentInput()

    def check(number: int) -> str | None:
        if number not in commits:
            return "not committed"
        problem = _check_commit(store, plan, commits[number], deep)
        if not problem and (problem := present.problem(number)):
            report.outdated.append(plan.name(number))
            return f"{problem}; clip-batch repair --output {quote(store.url)} --deep embeds it again"
        return problem or (_check_input(store, plan, commits[number], options) if deep else None)

    with ThreadPoolExecutor(8) as pool:
        problems = pool.map(check, range(len(plan.partitions)))
        report.problems = {plan.name(number): problem for number, problem in enumerate(problems) if problem}
    report.empty = {plan.name(number): commit.empty for number, commit in sorted(commits.items()) if commit.empty}
    report.rows = sum(commit.rows for commit in commits.values())
    report.failed = sum(sum(commit.failed.values()) for commit in commits.values())
    passed_over = [plan.passed_over, *(commit.passed_over for commit in commits.values())]
    report.passed_over = dict(sum(map(Counter, passed_over), Counter()))
    return report


def check_file(store: Store, name: str, stored: StoredFile, deep: bool) -> str | None:
    """What is wrong with a file's size, or with `deep` its sha256; None where nothing is."""
    try:
        size = store.size(name)
    except FileNotFoundError:
        return f"{name} is missing"
    if size != stored["bytes"]:
        return f"{name} has {size} bytes, committed were {stored['bytes']}"
    if deep and store.digest(name) != stored["sha256"]:
        return f"{name} is not what was committed (sha256 differs)"
    return None


def _check_commit(store: Store, plan: Plan, commit: Commit, deep: bool) -> str | None:
    """What is wrong with a commit or its files; None where nothing is."""
    if commit.plan != plan.generation(commit.partition).digest:
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
    return problem or (_check_vectors(store, commit) if deep else None)


def _check_rows(store: Store, commit: Commit) -> str | None:
    """Compare the rows in the headers of a part's files; CorruptError if one cannot be read."""
    from clip_batch.storage.arrow import ParquetFile

    if not commit.rows:
        return None
    if not _folders(commit):
        return "its commit names no file of vectors: run clip-batch repair"
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
    """The folders of a part's vectors; there is none for what the plan does not embed."""
    return [folder for folder in paths.VECTORS.values() if commit.file(folder)]


def _check_vectors(store: Store, commit: Commit) -> str | None:
    """Check that every row has unit norm; a text row may be all zero."""
    import numpy as np

    if not commit.rows:
        return None
    for folder in _folders(commit):
        name = commit.file(folder) or ""
        with store.fetch(name) as path:
            vectors = open_matrix(path)
            for start in range(0, commit.rows, 65_536):
                norms = np.linalg.norm(vectors[start : start + 65_536].astype(np.float32), axis=1)
                sound = np.abs(norms - 1) < 5e-3
                if folder == paths.VECTORS["text"]:
                    sound |= norms == 0
                if not sound.all():
                    row = int(start + np.flatnonzero(~sound)[0])
                    return f"{name} row {row} has norm {norms[row - start]:.4f}, not 1"
    return None


def _check_input(store: Store, plan: Plan, commit: Commit, options: dict[str, Any] | None) -> str | None:
    """Check that every sample of the input is a row or a failure, and that rows are in the order of the input."""
    expected = Counter[tuple[str | None, str, int | None]]()
    order: list[tuple[str | None, str, int | None]] = []
    for piece in plan.partitions[commit.partition].slices:
        for item in read_slice(replace(piece, shard=newest(piece.shard, commit.inputs)), plan, options):
            if isinstance(item, PassedOver):
                continue
            identity = (item.key, item.shard, item.offset)
            expected[identity] += 1
            if isinstance(item, Sample):
                order.append(identity)
    embedded = _identities(store, commit.file(paths.METADATA))
    failed = _identities(store, commit.file(paths.FAILURES))
    recorded = Counter(embedded) + Counter(failed)
    if expected != recorded:
        missing, extra = (expected - recorded).total(), (recorded - expected).total()
        return f"rows and input differ: {missing} samples are nowhere, {extra} rows too many"
    rest = iter(order)  # what was not embedded lies between the rows; in a compressed tar it may share their identity
    if not all(row in rest for row in embedded):
        return "rows are not in the order of the input"
    return None


def _identities(store: Store, name: str | None) -> list[tuple[str | None, str, int | None]]:
    """(key, shard, offset) of each row of a Parquet file; [] where there is no file."""
    from clip_batch.storage.arrow import ParquetFile

    if name is None:
        return []
    with store.open(name) as file:
        columns = ParquetFile(file).read(["key", "shard", "offset"])
    return list(zip(*(column.to_pylist() for column in columns.columns), strict=True))
