"""When a merge may make its version live: onto the version that it began from, unless it holds less than that one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from shlex import join

from clip_batch.errors import ClipBatchError, ConfigError, ConflictError
from clip_batch.index.manifest import MergedOutput, load_manifest
from clip_batch.index.merge.job import MergeJob
from clip_batch.index.paths import VersionPaths, is_version
from clip_batch.index.publications import live_version, publish
from clip_batch.types import counted


def make_live(job: MergeJob, sources: Sequence[MergedOutput], began: str | None) -> None:
    """Make the job's finished version live, which holds `sources`. `began` was live when the merge began.

    A merge with `add` goes live onto `began` alone. Any other one does not depend on what was live, so it goes live
    onto whatever it lacks nothing of; with `anew` also onto `began`. ConflictError: the live version is another one.
    ConfigError: it is `began`, and holds more.
    """
    if job.config.add:
        return publish(job.index, job.version, began)
    while True:
        live = live_version(job.index)
        if live != job.version:
            refuse_less(job, sources, live, began)
        try:
            return publish(job.index, job.version, live)
        except ConflictError:
            if live_version(job.index) == live:
                raise


def refuse_less(job: MergeJob, sources: Sequence[MergedOutput], live: str | None, began: str | None) -> None:
    """Errors as `make_live` raises them, where the job's version may not take the place of the live one."""
    if (job.config.anew and live == began) or not live:
        return
    if not (held := _lacking(job, sources, live)):
        return
    adding = join(["clip-batch", "merge", "--add", *job.places])
    text = f"live version {live} of {job.index.url} holds {' and '.join(held)} besides"
    if live == began:
        raise ConfigError(f"{text}: {adding} adds to it, and merge --anew takes its place")
    raise ConflictError(f"{text}, and has gone live meanwhile: {adding} adds to it, or merge --anew again")


def _lacking(job: MergeJob, sources: Sequence[MergedOutput], live: str) -> list[str]:
    """What a live version holds and `sources` do not, as text."""
    with contextlib.suppress(ClipBatchError):  # a live version that cannot be read holds nothing
        held = load_manifest(job.index, live)
        return [
            f"{source.output} ({counted(source.rows, 'row')})"
            for source in held.sources
            if not any(_covers(ours, source) for ours in sources)
        ]
    return []


def _covers(new: MergedOutput, old: MergedOutput) -> bool:
    """Whether an OUT, as one version holds it, has all that another version holds of it."""
    if new.digest == old.digest:
        return True
    same = new.output == old.output or (bool(old.plan) and new.plan == old.plan)
    return same and set(new.missing) <= set(old.missing) and new.rows >= old.rows


def untrained(job: MergeJob) -> ClipBatchError:
    """Why the tasks after `train` find no template: it was not run, or another version has gone live since."""
    command = f"run {job.command} --task train"
    for name in filter(is_version, job.index.list("") if job.config.add else ()):
        paths = VersionPaths(name)
        with contextlib.suppress(FileNotFoundError, ValueError):
            record = job.index.read_json(paths.template_record)
            if record.get("job") == job.identity and not job.index.exists(paths.manifest):
                return ConflictError(
                    f"{job.index.url} served version {record['replaces'] or 'none'} when this merge was trained, and "
                    f"serves {job.live or 'none'} now: {command}, and the other tasks again"
                )
    return ConfigError(f"{job.index.url}/{job.version} is not trained yet: {command}")
