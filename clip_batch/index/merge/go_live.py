"""When a merge may make its version live: onto the version that it began from, unless it holds less than that one."""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from shlex import join

from clip_batch.errors import ClipBatchError, ConfigError, ConflictError
from clip_batch.index import held
from clip_batch.index.held import HeldSlice, Places
from clip_batch.index.manifest import Manifest, load_manifest
from clip_batch.index.merge.job import MergeJob
from clip_batch.index.paths import VersionPaths, is_version
from clip_batch.index.publications import live_version, publish
from clip_batch.types import counted


def make_live(job: MergeJob, manifest: Manifest, began: str | None) -> None:
    """Make the job's finished version live, of which `manifest` is. `began` was live when the merge began.

    A merge with `add` goes live onto `began` alone. Any other one does not depend on what was live, so it goes live
    onto whatever it lacks nothing of; with `anew` also onto `began`. ConflictError: the live version is another one.
    ConfigError: it is `began`, and holds more.
    """
    if job.config.add:
        return publish(job.index, job.version, began)
    ours = [source.output for source in manifest.sources], held.read_sources(job.index, manifest)
    while True:
        live = live_version(job.index)
        if live != job.version:
            _refuse_less(job, Holdings(*ours), live, began)
        try:
            return publish(job.index, job.version, live)
        except ConflictError:
            if live_version(job.index) == live:
                raise


def refuse_less(job: MergeJob) -> None:
    """ConfigError where the version that the job would build may not take the place of the live one."""
    sources = job.source.sources
    ours = Holdings([source.store.url for source in sources], [held.slices_of(source) for source in sources])
    _refuse_less(job, ours, job.live, job.live)


def _refuse_less(job: MergeJob, ours: Holdings, live: str | None, began: str | None) -> None:
    """Errors as `make_live` raises them, where a version that holds `ours` may not take the place of the live one."""
    if (job.config.anew and live == began) or not live:
        return
    if not (lacking := _lacking(job, ours, live)):
        return
    adding = join(["clip-batch", "merge", "--add", *job.places])
    text = f"live version {live} of {job.index.url} holds {' and '.join(lacking)} besides"
    if live == began:
        raise ConfigError(f"{text}: {adding} adds to it, and merge --anew takes its place")
    raise ConflictError(f"{text}, and has gone live meanwhile: {adding} adds to it, or merge --anew again")


def _lacking(job: MergeJob, ours: Holdings, live: str) -> list[str]:
    """The rows of each OUT that a live version holds and `ours` does not, as text."""
    rows: Counter[str] = Counter()
    with contextlib.suppress(ClipBatchError):  # a live version that cannot be read holds nothing
        manifest = load_manifest(job.index, live)
        theirs = held.read_sources(job.index, manifest)
        last = {ours.places.of(one.url): one.content for slices in theirs for one in slices if one.size is not None}
        for source, slices in zip(manifest.sources, theirs, strict=False):
            for one in slices:
                replaced = one.content.differs(last.get(ours.places.of(one.url), one.content))
                if not replaced and not ours.cover(source.output, one):
                    rows[source.output] += one.rows
    return [f"{counted(count, 'row')} of {output}" for output, count in rows.items()]


class Holdings:
    """What OUTs hold: slices of source shards by their commits and places."""

    def __init__(self, outputs: Sequence[str], slices: Sequence[Sequence[HeldSlice]]) -> None:
        """`slices[i]` are those of the OUT `outputs[i]`."""
        self.places = Places()
        self._commits = {one.commit for of_one in slices for one in of_one if one.commit}
        self._at: defaultdict[str, list[tuple[str, HeldSlice]]] = defaultdict(list)
        for output, of_one in zip(outputs, slices, strict=True):
            for one in of_one:
                self._at[self.places.of(one.url)].append((output, one))

    def cover(self, output: str, old: HeldSlice) -> bool:
        """Whether a slice that an index has through an OUT is held: by that commit, in that partition, or elsewhere.

        Positions in the listing of a folder mean the same only in one listing, which its etag names.
        """
        if old.commit in self._commits:
            return True
        alike = []
        for ours, one in self._at.get(self.places.of(old.url), ()):
            same_partition = ours == output and one.partition == old.partition
            known = None not in (one.size, old.size)
            same_content = not one.content.differs(old.content) if known else one.etag == old.etag
            if same_partition or same_content:
                alike.append((one.start, _stop(one)))
        reached: float = old.start
        for start, stop in sorted(alike):
            reached = max(reached, stop) if start <= reached else reached
        return reached >= _stop(old) or (old.commit == "" and bool(alike))


def _stop(one: HeldSlice) -> float:
    """Where a slice ends, as a number: infinity for one that goes to its shard's end."""
    return math.inf if one.stop is None or one.stop == one.size else one.stop


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
