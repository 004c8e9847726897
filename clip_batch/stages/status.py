"""status: one view of OUT, read from storage, whatever launched the work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from clip_batch import part
from clip_batch.plan import load_plan
from clip_batch.store import Store
from clip_batch.types import format_numbers


def status(store: Store) -> dict[str, Any]:
    """One view of OUT, whatever launched the work: plain values, ready for JSON."""
    plan = load_plan(store)
    commits = part.read_commits(store)
    everything = set(range(len(plan.partitions)))
    errors = _last_errors(store)
    failed = sorted(set(errors) - set(commits))
    missing = sorted(everything - set(commits))
    rows = sum(commit.rows for commit in commits.values())
    reasons = _total(commit.failed for commit in commits.values())
    busy = [(commit.started, commit.finished) for commit in commits.values() if commit.rows]
    wall = max(end for _, end in busy) - min(start for start, _ in busy) if busy else 0.0
    rate = rows / wall if wall else 0.0
    left = len(missing) * rows / len(commits) if commits else 0.0
    return {
        "partitions": len(plan.partitions),
        "done": len(commits),
        "failed": failed,
        "missing": missing,
        "rows": rows,
        "failures": dict(reasons),
        "warnings": dict(_total(commit.warnings for commit in commits.values())),
        "errors": {str(number): errors[number] for number in failed},
        "images_per_second": round(rate, 1),
        "eta_seconds": round(left / rate) if rate else None,
        "relaunch": relaunch(store.url, missing) if missing else None,
    }


def relaunch(output: str, missing: list[int]) -> str:
    """The command that runs exactly what is missing."""
    return f"clip-batch worker --output {output} --partitions {format_numbers(missing)}"


def _total(counts: Iterable[dict[str, int]]) -> Counter[str]:
    total = Counter[str]()
    for one in counts:
        total.update(one)
    return total


def _last_errors(store: Store) -> dict[int, str]:
    records = (store.read_json(f"{part.ATTEMPTS}/{name}") for name in store.list(part.ATTEMPTS))
    return {record["partition"]: record["error"] for record in records}


def describe(found: dict[str, Any]) -> str:
    """The same as text for people."""
    lines = [
        f"{found['done']:,} of {found['partitions']:,} partitions done, {len(found['missing']):,} missing, "
        f"{len(found['failed']):,} of them failed",
        f"{found['rows']:,} samples embedded, {found['images_per_second']:,} images/s"
        + (f", ETA {found['eta_seconds']:,} s" if found["eta_seconds"] else ""),
    ]
    for title in ("failures", "warnings"):
        if found[title]:
            lines.append(f"{title}: " + ", ".join(f"{reason} {count:,}" for reason, count in found[title].items()))
    lines += [f"partition {number}: {error}" for number, error in found["errors"].items()]
    if found["relaunch"]:
        lines.append(f"to run what is missing: {found['relaunch']}")
    return "\n".join(lines)
