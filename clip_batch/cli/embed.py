"""plan, prefetch, embed and worker: from tars to committed embeddings."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

from clip_batch.cli.arguments import JsonArguments, Only, OutputArguments, answer, say, say_next
from clip_batch.config import EmbedConfig, PlanConfig, StorageConfig
from clip_batch.config.values import Count, Threads
from clip_batch.errors import ConfigError
from clip_batch.types import counted, format_counts

if TYPE_CHECKING:
    from clip_batch.embeddings.embed import Outcome
    from clip_batch.embeddings.slots import Slot


@dataclass(frozen=True, kw_only=True)
class PlanArguments(JsonArguments, OutputArguments):
    """Where `plan` writes, and what it leaves out."""

    excluding: list[str] = field(default_factory=list, metadata={"repeat": True, "short": "--except", "path": True})
    """Leave out what the plan of this OUT has, such as that of the days before; given once for each."""


def plan(arguments: PlanArguments, plan: PlanConfig, storage: StorageConfig) -> int:
    """Freeze the plan: which tars are embedded, in which partitions, by which encoder."""
    answer(arguments, *_plan(arguments.output, plan, storage, arguments.excluding))
    say_next(f"clip-batch embed --output {quote(arguments.output)}, or clip-batch submit for many machines")
    return 0


def _plan(
    output: str, config: PlanConfig, storage: StorageConfig, excluding: Sequence[str] = ()
) -> tuple[dict[str, Any], str]:
    """Make the plan; what was planned, as values and as text."""
    from clip_batch.plan.plan import make_plan

    if not config.input:
        raise ConfigError("plan needs --input: paths, URLs, globs or brace patterns of tars")
    plan = make_plan(config.input, output, config, excluding=excluding, storage=storage, progress=say)
    shards = {piece.shard.url for partition in plan.partitions for piece in partition.slices}
    summary = {"partitions": len(plan.partitions), "shards": len(shards), "encoder": plan.encoder.fingerprint}
    summary["preprocess"], summary["generations"] = plan.encoder.preprocess, max(len(plan.generations), 1)
    text = f"planned {counted(len(shards), 'shard')} in {counted(len(plan.partitions), 'partition')}: {output}"
    text += f", passed over: {format_counts(plan.passed_over)}" if plan.passed_over else ""
    return {**summary, "passed_over": plan.passed_over}, text


@dataclass(frozen=True, kw_only=True)
class PrefetchArguments(JsonArguments):
    """Whose model `prefetch` fetches."""

    output: str = ""
    """The embeddings folder OUT whose planned model is fetched, instead of the one of --model."""


def prefetch(
    arguments: PrefetchArguments,
    plan: Annotated[PlanConfig, Only(("model", "pretrained", "preprocess", "precision"))],
    storage: StorageConfig,
) -> int:
    """Fetch a model's files into this machine's caches, once for all workers: --model's, or the plan's of --output."""
    from clip_batch import encoders
    from clip_batch.plan.plan import load_plan
    from clip_batch.storage.store import Store

    options = storage.storage_options
    if arguments.output:
        planned = load_plan(Store(arguments.output, options)).encoder
        say(f"{planned.model} {planned.pretrained}".strip() + " is fetched, unless it is on this machine")
        spec = encoders.resolve(planned.model, planned.pretrained, planned.preprocess, planned.precision, options)
        encoders.check_weights(spec.weights, planned)
        spec = replace(spec, exif_rotation=planned.exif_rotation)
    else:
        say(f"{plan.model} {plan.pretrained}".strip() + " is fetched, unless it is on this machine")
        mode = "fast" if plan.preprocess == "auto" else plan.preprocess
        spec = encoders.resolve(plan.model, plan.pretrained, mode, plan.precision, options)
    text = f"{spec.model} {spec.pretrained}".strip() + f" is on this machine: {spec.weights[:12]}"
    values = spec.record()
    if plan.preprocess == "auto" and not arguments.output:  # only a trial of the model tells which it is
        del values["preprocess"], values["fingerprint"]
    answer(arguments, values, text)
    if arguments.output:
        say_next(f"clip-batch embed --output {quote(arguments.output)}")
    else:
        named = f" --pretrained {quote(spec.pretrained)}" if spec.pretrained else ""
        say_next(f"clip-batch run FOLDER --model {quote(spec.model)}{named}")
    return 0


@dataclass(frozen=True, kw_only=True)
class EmbedArguments(JsonArguments, OutputArguments):
    """What is embedded on this machine, and by how many processes."""

    workers: Threads = 0
    """Worker processes on this machine; 0: one per GPU, or one."""


def embed(arguments: EmbedArguments, embed: EmbedConfig, plan: PlanConfig, storage: StorageConfig) -> int:
    """Embed every uncommitted partition on this machine; with --input, plan first."""
    from clip_batch.plan.plan import count_partitions
    from clip_batch.storage.store import Store

    if plan.input:
        say(_plan(arguments.output, plan, storage)[1])
    else:
        count_partitions(Store(arguments.output, storage.storage_options))  # before torch is loaded
    from clip_batch.launch import local

    workers = local.processes(arguments.workers, embed)
    if workers <= 1:
        code = report(arguments, local.run_worker(arguments.output, None, embed, storage), embed.allow_empty)
    else:
        code = local.run_workers(arguments.output, workers, embed, storage)
    if code == 0:
        say_next(f"clip-batch merge --output {quote(arguments.output)} --index INDEX")
    return code


@dataclass(frozen=True, kw_only=True)
class WorkerArguments(JsonArguments, OutputArguments):
    """Which partitions one worker embeds."""

    partitions: str = ""
    """The partitions to embed, such as 0,3-5; without it, those of --slot."""
    slot: int | None = None
    """This worker's number among `slots`, from 0."""
    slots: Count | None = None
    """How many workers share the plan; may change between launches."""
    submission: str = ""
    """Take the partitions of `slot` from this submission (see `submit`) instead of the plan."""


def worker(arguments: WorkerArguments, embed: EmbedConfig, storage: StorageConfig) -> int:
    """Run one worker on the given partitions, or on those of its slot, that are not committed yet."""
    from clip_batch.launch import local

    if bool(arguments.partitions) == (arguments.slot is not None):
        raise ConfigError("worker needs either --partitions 0,3-5, or --slot I with --slots N or --submission ID")
    work = _numbers(arguments.partitions) if arguments.slot is None else _slot(arguments, arguments.slot)
    return report(arguments, local.run_worker(arguments.output, work, embed, storage), embed.allow_empty)


def _numbers(text: str) -> list[int]:
    from clip_batch.types import parse_numbers

    try:
        return parse_numbers(text)
    except ValueError:
        raise ConfigError(f"--partitions {text!r} is not understood: write it like 0,3-5") from None


def _slot(arguments: WorkerArguments, number: int) -> Slot:
    """The slot of a submission, or of the whole plan."""
    from clip_batch.embeddings.slots import Slot

    if bool(arguments.submission) == (arguments.slots is not None):
        raise ConfigError("--slot needs --slots N, how many workers share the plan, or --submission ID")
    return Slot(number, arguments.slots or 0, arguments.submission)


def report(arguments: JsonArguments, outcomes: Sequence[Outcome], allow_empty: bool) -> int:
    """Print what became of partitions; the exit code, 1 if some failed or, unless `allow_empty`, have no row."""
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    for outcome in failed:
        print(f"partition {outcome.partition} failed: {outcome.error}", file=sys.stderr)
    empty = [outcome for outcome in outcomes if outcome.empty]
    for outcome in empty:
        print(f"partition {outcome.partition} is committed without a row: {outcome.empty}", file=sys.stderr)
    hints = [outcome for outcome in outcomes if outcome.hint and not outcome.empty]
    for outcome in hints[:1]:
        others = f" and {len(hints) - 1:,} more" if hints[1:] else ""
        print(f"partition {outcome.partition}{others}: {outcome.hint}", file=sys.stderr)
    if empty and not allow_empty:
        print("look at its input and options; --allow-empty accepts partitions without a row", file=sys.stderr)
    rows, bad = sum(outcome.rows for outcome in outcomes), sum(outcome.failed for outcome in outcomes)
    done = counted(len(outcomes) - len(failed), "partition")
    text = f"{done} done, {counted(rows, 'sample')} embedded, {bad:,} listed as failed"
    if passed_over := sum((Counter(outcome.passed_over) for outcome in outcomes), Counter[str]()):
        text += f", passed over: {format_counts(passed_over)}"
    if warnings := sum((Counter(outcome.warnings) for outcome in outcomes), Counter[str]()):
        text += f", warnings: {format_counts(warnings)}"
    answer(arguments, [asdict(outcome) for outcome in outcomes], text)
    return 1 if failed or (empty and not allow_empty) else 0
