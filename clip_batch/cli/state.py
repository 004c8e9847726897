"""status, verify, repair and gc: what is done, whether it is sound, and how it is repaired."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from typing import Annotated

from clip_batch.cli.arguments import IndexArguments, JsonArguments, OutputArguments, answer
from clip_batch.cli.embed import report
from clip_batch.config import EmbedConfig, StorageConfig
from clip_batch.config.values import Range
from clip_batch.errors import ConfigError
from clip_batch.types import counted, format_counts


@dataclass(frozen=True, kw_only=True)
class StatusArguments(JsonArguments):
    """Whose state `status` tells."""

    output: str = ""
    """The embeddings folder OUT, if its state is wanted."""
    index: list[str] = field(default_factory=list)
    """The index folder INDEX, if its state is wanted."""


def status(arguments: StatusArguments, storage: StorageConfig) -> int:
    """Report what is done, failed and missing, the rate and the ETA, of OUT or of an index, and what to type next."""
    from clip_batch.storage.store import Store

    if arguments.index:
        from clip_batch.index.status import describe as describe_index
        from clip_batch.index.status import index_status

        folder = IndexArguments(index=arguments.index).index_folder
        state = index_status(Store(folder, storage.storage_options))
        answer(arguments, asdict(state), describe_index(state))
        return 0
    if not arguments.output:
        raise ConfigError("--output OUT or --index INDEX is needed: the folder whose state is wanted")
    from clip_batch.embeddings.status import describe, status

    counts = status(Store(arguments.output, storage.storage_options))
    answer(arguments, asdict(counts), describe(counts))
    return 0


@dataclass(frozen=True, kw_only=True)
class VerifyArguments(JsonArguments):
    """What `verify` proves, and how thoroughly."""

    output: str = ""
    """The embeddings folder OUT, if that is to be verified."""
    index: list[str] = field(default_factory=list)
    """The index folder INDEX, if that is to be verified."""
    deep: bool = False
    """Read every byte of OUT or INDEX, and of OUT's input; else sizes, counts, and a sample of what was removed."""


def verify(arguments: VerifyArguments, storage: StorageConfig) -> int:
    """Prove that OUT, or an index, is complete and sound; otherwise exit with 1 and name what is not."""
    from clip_batch.embeddings.verify import verify_output
    from clip_batch.storage.store import Store

    options = storage.storage_options
    if arguments.index:
        from clip_batch.search.verify import verify_searches

        folder = IndexArguments(index=arguments.index).index_folder
        report = verify_searches(folder, arguments.deep, storage)
    elif arguments.output:
        report = verify_output(Store(arguments.output, options), arguments.deep, options)
    else:
        raise ConfigError("--output OUT or --index INDEX is needed: the folder to verify")
    for name, problem in (*report.problems.items(), *report.empty.items()):
        print(f"{name}: {problem}", file=sys.stderr)
    proof = "deep" if arguments.deep else "quick"
    sound = max(0, report.checked - len(report.problems))
    text = f"{sound} of {report.checked} sound ({proof}), {counted(report.rows, 'row')}"
    text += f", {report.failed:,} listed as failed" if report.failed else ""
    if report.removed:
        searched = (
            f"none of {report.searched:,} found by searches" if report.searched else "not searched for (--deep does)"
        )
        text += f", {report.removed:,} removed, {searched}" if "removed rows" not in report.problems else ""
    text += f", passed over: {format_counts(report.passed_over)}" if report.passed_over else ""
    text += f", {counted(len(report.empty), 'partition')} without a row" if report.empty else ""
    answer(arguments, {"ok": report.ok, **asdict(report)}, text)
    return 0 if report.ok else 1


@dataclass(frozen=True, kw_only=True)
class RepairArguments(JsonArguments, OutputArguments):
    """How thoroughly `repair` looks."""

    deep: bool = False
    """Read every byte of OUT and of its input first; without it, only sizes and counts are compared."""
    retry_failed: list[str] = field(default_factory=list, metadata={"metavar": "REASON"})
    """Embed partitions again that have failures for these reasons, or (changed, gone) input that is not as it was."""


def repair(arguments: RepairArguments, embed: EmbedConfig, storage: StorageConfig) -> int:
    """Embed again only those partitions in which verify finds a problem, or whose failed samples are to be retried."""
    from clip_batch.embeddings.renewal import CHANGED, GONE, check_reasons
    from clip_batch.embeddings.repair import repair
    from clip_batch.embeddings.verify import verify_output
    from clip_batch.launch import local
    from clip_batch.storage.store import Store

    options = storage.storage_options
    store = Store(arguments.output, options)
    reasons = {*arguments.retry_failed}
    check_reasons(reasons)
    found = verify_output(store, arguments.deep, options)
    if found.outdated:
        reasons |= {CHANGED, GONE}
    numbers, renew = repair(store, {*found.problems} - {*found.outdated}, reasons)
    outcomes = local.run_worker(arguments.output, [*numbers, *renew], embed, storage, renew)
    return report(arguments, outcomes, embed.allow_empty)


@dataclass(frozen=True, kw_only=True)
class GcArguments(JsonArguments):
    """What `gc` removes."""

    output: str = ""
    """The embeddings folder OUT, if that is to be cleaned."""
    index: list[str] = field(default_factory=list)
    """The index folder INDEX, if that is to be cleaned."""
    everything: bool = False
    """Remove uncommitted files of unfinished partitions of OUT too; no worker may be running."""
    keep: Annotated[int, Range(0, 10_000)] = 3
    """How many versions of INDEX that were live before the live one are kept, to go back to."""
    older_than: Annotated[float, Range(0, 36_500)] = 7
    """Days for which a version of INDEX is kept after it was live or written to: it may be built, or served."""
    dry_run: bool = False
    """Remove nothing, and list what would be removed."""


def gc(arguments: GcArguments, storage: StorageConfig) -> int:
    """Remove the files of OUT that no commit names, or the versions of an index that nothing needs."""
    from clip_batch.plan.plan import count_partitions
    from clip_batch.storage.store import Store

    if arguments.index:
        from clip_batch.index.gc import describe, gc_index

        store = Store(IndexArguments(index=arguments.index).index_folder, storage.storage_options)
        report = gc_index(store, arguments.keep, arguments.older_than, arguments.dry_run)
        answer(arguments, asdict(report), describe(report))
        return 0
    if not arguments.output:
        raise ConfigError("--output OUT or --index INDEX is needed: the folder to clean")
    store = Store(arguments.output, storage.storage_options)
    count_partitions(store)  # refuses a folder without a plan, such as a mistyped one
    from clip_batch.embeddings.repair import gc

    removed = gc(store, arguments.everything, arguments.dry_run)
    text = f"{counted(len(removed), 'file')} {'would be ' if arguments.dry_run else ''}removed"
    answer(arguments, removed, "\n".join([*(removed if arguments.dry_run else ()), text]))
    return 0
