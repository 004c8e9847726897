"""status: what is done in OUT, read from storage, whatever launched the work.

One listing of the commits tells what is committed. The counts of the commits come from the workers' records, which are
one file a worker; only commits that no record counts are read themselves.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from clip_batch.config import html
from clip_batch.embeddings import submission, workers
from clip_batch.embeddings.attempts import last_errors
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.workers import CommitCounts, WorkerRecord
from clip_batch.plan.state import commit_names
from clip_batch.plan.stored import read_generations
from clip_batch.storage.store import Store
from clip_batch.types import counted, format_numbers

LONGEST_COMMAND = 2000
"""A relaunch command names the missing partitions if their numbers take at most this many characters."""

MOST_ERRORS = 20
"""Partitions that `describe_partitions` names."""


@dataclass(frozen=True)
class LiveWorker:
    """A worker at work: its host and process, its scheduler's name for it, and its partitions."""

    worker: str
    job: str
    running: list[int]


@dataclass(frozen=True)
class GenerationStatus:
    """The partitions that were planned together, from number `first` on: how many they are, and how many are done."""

    first: int
    partitions: int
    done: int


@dataclass(frozen=True)
class OutputStatus:
    """The state of OUT; the JSON of `clip-batch status --json` has the same keys.

    `failed` are the missing partitions whose last attempt failed, and `errors` what it said, by partition. `empty` says
    why committed partitions have no row, by partition. `failures` and `warnings` count samples by reason.
    `images_per_second` is the rate of the live workers, or if there are none, that of the whole run so far. `gpu_hours`
    is the time that workers held a GPU, idle or not. `relaunch` is the command that runs what is missing, None where
    nothing is, and `retry` the one that embeds partitions with failures again. `generations` has the first plan and
    each extension of it.
    """

    partitions: int
    done: int
    failed: list[int]
    missing: list[int]
    running: list[int]
    workers: list[LiveWorker]
    rows: int
    failures: dict[str, int]
    warnings: dict[str, int]
    errors: dict[str, str]
    empty: dict[str, str]
    images_per_second: float
    eta_seconds: int | None
    gpu_hours: float
    relaunch: str | None
    generations: list[GenerationStatus]
    retry: str | None

    def _repr_html_(self) -> str:
        names = {name: len(getattr(self, name)) for name in ("missing", "running", "workers", "generations")}
        return html.table({**asdict(self), **names})


def status(store: Store) -> OutputStatus:
    """The state of OUT. PlanError: it has no plan."""
    generations = read_generations(store)
    partitions = generations[-1].stop
    records = workers.read_records(store)
    counts = _counts(store, records, partitions)
    missing = sorted(set(range(partitions)) - set(counts))
    errors = last_errors(store, set(missing))
    live = [record for record in records if record.alive]
    rows = sum(count["rows"] for count in counts.values())
    rate = sum(record.samples / max(record.beat - record.started, 1e-3) for record in live)
    rows_left = len(missing) * rows / len(counts) if counts else 0.0
    failures = _total(count["failed"] for count in counts.values())
    return OutputStatus(
        partitions=partitions,
        done=len(counts),
        failed=sorted(errors),
        missing=missing,
        running=sorted({number for record in live for number in record.running} - set(counts)),
        workers=[LiveWorker(record.worker, record.job, record.running) for record in live],
        rows=rows,
        failures=failures,
        warnings=_total(count["warnings"] for count in counts.values()),
        errors={str(number): error for number, error in sorted(errors.items())},
        empty={str(number): empty for number, count in sorted(counts.items()) if (empty := count.get("empty"))},
        images_per_second=round(rate or _past_rate(counts), 1),
        eta_seconds=round(rows_left / rate) if rate else None,
        gpu_hours=round(sum(record.gpus * (record.beat - record.started) for record in records) / 3600, 3),
        relaunch=relaunch(store, missing) if missing else None,
        generations=[
            GenerationStatus(start, stop - start, sum(start <= number < stop for number in counts))
            for start, stop, _ in generations
        ],
        retry=retry(store, failures) if failures else None,
    )


def _counts(store: Store, records: Iterable[WorkerRecord], partitions: int) -> dict[int, CommitCounts]:
    """The counts of every committed partition."""
    recorded = {int(number): counts for record in records for number, counts in record.committed.items()}
    names = [name for name in commit_names(store) if int(name) < partitions]  # others were added since we looked
    counts = {number: recorded[number] for number in map(int, names) if number in recorded}
    commits = read_commits(store, [name for name in names if int(name) not in recorded])
    return counts | {number: workers.counts_of(commit) for number, commit in commits.items()}


def _past_rate(counts: dict[int, CommitCounts]) -> float:
    """Images a second from the start of the first commit to the end of the last."""
    busy = [count for count in counts.values() if count["rows"]]
    if not busy:
        return 0.0
    seconds = max(count["finished"] for count in busy) - min(count["started"] for count in busy)
    return sum(count["rows"] for count in busy) / max(seconds, 1e-3)


def _total(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for count in counts:
        total.update(count)
    return dict(total)


def relaunch(store: Store, missing: list[int]) -> str:
    """The command that runs the missing partitions: that of the last submission, or one for this machine."""
    if ids := submission.ids(store):
        return submission.load(store, ids[-1]).command
    output, numbers = store.url, format_numbers(missing)
    if len(numbers) > LONGEST_COMMAND:
        return f"clip-batch embed --output {shlex.quote(output)}"
    return f"clip-batch worker --output {shlex.quote(output)} --partitions {numbers}"


def retry(store: Store, reasons: Iterable[str]) -> str:
    """The command that embeds the partitions again that have failures for these reasons."""
    return f"clip-batch repair --output {shlex.quote(store.url)} --retry-failed {' '.join(sorted(reasons))}"


def describe(status: OutputStatus) -> str:
    """A status as text for people."""
    lines = [
        f"{status.done:,} of {status.partitions:,} partitions done, {len(status.missing):,} missing: "
        f"{len(status.running):,} of them running on {len(status.workers):,} workers, "
        f"{len(status.failed):,} failed when last tried",
        f"{counted(status.rows, 'sample')} embedded, {status.images_per_second:,} images/s"
        + (f", ETA {_duration(status.eta_seconds)}" if status.eta_seconds else "")
        + (f", {status.gpu_hours:,} GPU-hours" if status.gpu_hours else ""),
    ]
    for number, one in enumerate(status.generations if status.generations[1:] else ()):
        added = "the first plan" if number == 0 else f"added as generation {number}"
        lines.append(f"{added}, from partition {one.first:,} on: {one.done:,} of {one.partitions:,} done")
    for title, counts in (("failures", status.failures), ("warnings", status.warnings)):
        if counts:
            lines.append(f"{title}: " + ", ".join(f"{reason} {count:,}" for reason, count in counts.items()))
    if status.retry:
        lines.append(f"to try failed samples again, once they are mended: {status.retry}")
    lines += describe_partitions(status.errors, "that failed: --json lists them")
    lines += describe_partitions(status.empty, "without a row: --json lists them")
    if status.relaunch:
        lines.append(f"to run what is missing: {status.relaunch}")
    return "\n".join(lines)


def describe_partitions(texts: Mapping[str, str], others: str) -> list[str]:
    """One line for each partition with its text, for at most `MOST_ERRORS` of them, and one that counts the others."""
    lines = [f"partition {number}: {text}" for number, text in list(texts.items())[:MOST_ERRORS]]
    more = len(texts) - len(lines)
    return [*lines, f"... and {more:,} more partitions {others}"] if more else lines


def _duration(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
