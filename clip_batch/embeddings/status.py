"""status: one view of OUT, read from storage, whatever launched the work.

What is committed comes from one listing of the commits. Their counts come from the workers' records,
a file a worker, and from the commits themselves only where no record tells.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable
from typing import Any

from clip_batch.embeddings import submission, workers
from clip_batch.embeddings.commits import commit_names, read_commits
from clip_batch.plan import paths
from clip_batch.plan.plan import count_partitions
from clip_batch.storage.store import Store
from clip_batch.types import format_numbers

LONGEST_COMMAND = 2000
"""Characters of partition numbers up to which a relaunch command names them."""


def status(store: Store) -> dict[str, Any]:
    """One view of OUT, whatever launched the work: plain values, ready for JSON.

    `images_per_second` is the rate of the workers alive now, else that of the whole run so far.
    `gpu_hours` is the time that workers held a GPU, idle or not.
    """
    partitions = count_partitions(store)
    records = workers.read_records(store)
    counts = _counts(store, records)
    missing = sorted(set(range(partitions)) - set(counts))
    errors = _last_errors(store, set(missing))
    alive = [record for record in records if record.alive]
    rows = sum(count["rows"] for count in counts.values())
    rate = sum(record.samples / max(record.beat - record.started, 1e-3) for record in alive)
    left = len(missing) * rows / len(counts) if counts else 0.0
    return {
        "partitions": partitions,
        "done": len(counts),
        "failed": sorted(errors),
        "missing": missing,
        "running": sorted({number for record in alive for number in record.running} - set(counts)),
        "workers": [{"worker": record.worker, "job": record.job, "running": record.running} for record in alive],
        "rows": rows,
        "failures": dict(_total(count["failed"] for count in counts.values())),
        "warnings": dict(_total(count["warnings"] for count in counts.values())),
        "errors": {str(number): error for number, error in sorted(errors.items())},
        "images_per_second": round(rate or _past_rate(counts), 1),
        "eta_seconds": round(left / rate) if rate else None,
        "gpu_hours": round(sum(record.gpus * (record.beat - record.started) for record in records) / 3600, 3),
        "relaunch": relaunch(store, missing) if missing else None,
    }


def _counts(store: Store, records: list[workers.WorkerRecord]) -> dict[int, dict[str, Any]]:
    """The counts of every committed partition."""
    told: dict[int, dict[str, Any]] = {}
    for record in records:
        told.update((int(number), count) for number, count in record.committed.items())
    names = commit_names(store)
    counts = {number: told[number] for number in map(int, names) if number in told}
    untold = read_commits(store, [name for name in names if int(name) not in told])
    return counts | {number: vars(commit) for number, commit in untold.items()}


def _past_rate(counts: dict[int, dict[str, Any]]) -> float:
    busy = [count for count in counts.values() if count["rows"]]
    if not busy:
        return 0.0
    wall = max(count["finished"] for count in busy) - min(count["started"] for count in busy)
    return float(sum(count["rows"] for count in busy) / max(wall, 1e-3))


def relaunch(store: Store, missing: list[int]) -> str:
    """The command that runs what is missing: the last submission's, else one for this machine."""
    if made := submission.ids(store):
        return submission.load(store, made[-1]).command
    output, numbers = shlex.quote(store.url), format_numbers(missing)
    if len(numbers) > LONGEST_COMMAND:
        return f"clip-batch embed --output {output}"
    return f"clip-batch worker --output {output} --partitions {numbers}"


def _total(counts: Iterable[dict[str, int]]) -> Counter[str]:
    total = Counter[str]()
    for one in counts:
        total.update(one)
    return total


def _last_errors(store: Store, missing: set[int]) -> dict[int, str]:
    """What the last failed attempt at each missing partition said."""
    errors: dict[int, tuple[float, str]] = {}
    for name in store.list(paths.ATTEMPTS):
        found = paths.parse_attempt(name)
        if found and found[0] in missing:
            record = store.read_json(f"{paths.ATTEMPTS}/{name}")
            errors[found[0]] = max(errors.get(found[0], (0.0, "")), (record["time"], record["error"]))
    return {number: error for number, (_, error) in errors.items()}


def describe(found: dict[str, Any]) -> str:
    """The same as text for people."""
    done, partitions, missing = found["done"], found["partitions"], len(found["missing"])
    lines = [
        f"{done:,} of {partitions:,} partitions done, {missing:,} missing: {len(found['running']):,} of them running "
        f"on {len(found['workers']):,} workers, {len(found['failed']):,} failed when last tried",
        f"{found['rows']:,} samples embedded, {found['images_per_second']:,} images/s"
        + (f", ETA {_duration(found['eta_seconds'])}" if found["eta_seconds"] else "")
        + (f", {found['gpu_hours']:,} GPU-hours" if found["gpu_hours"] else ""),
    ]
    for title in ("failures", "warnings"):
        if found[title]:
            lines.append(f"{title}: " + ", ".join(f"{reason} {count:,}" for reason, count in found[title].items()))
    lines += [f"partition {number}: {error}" for number, error in list(found["errors"].items())[:20]]
    if len(found["errors"]) > 20:
        lines.append(f"... and {len(found['errors']) - 20:,} more partitions that failed: --json lists them")
    if found["relaunch"]:
        lines.append(f"to run what is missing: {found['relaunch']}")
    return "\n".join(lines)


def _duration(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
