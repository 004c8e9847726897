"""plan, prefetch, embed and worker: from tars to committed embeddings."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from clip_batch.cli.arguments import Options, answer, say
from clip_batch.config import TargetConfig
from clip_batch.errors import ConfigError

if TYPE_CHECKING:
    from clip_batch.embeddings.embed import Outcome
    from clip_batch.embeddings.slots import Slot


def plan(options: Options) -> int:
    """Freeze the plan: which tars, in which partitions, by which encoder."""
    answer(options, *planned(options))
    return 0


def planned(options: Options) -> tuple[dict[str, Any], str]:
    """What was planned, as values and as text."""
    from clip_batch.plan.plan import make_plan

    if not options.plan.input:
        raise ConfigError("plan needs --input: paths, URLs, globs or brace patterns of tars")
    made = make_plan(options.plan, options.output, options.storage, say)
    shards = {piece.shard.url for partition in made.partitions for piece in partition.slices}
    summary = {"partitions": len(made.partitions), "shards": len(shards), "encoder": made.encoder.fingerprint}
    return summary, f"planned {len(shards):,} shards in {len(made.partitions):,} partitions: {options.target.output}"


def prefetch(options: Options) -> int:
    """Fetch a model's files into this machine's caches, once for all workers: --model's, or the plan's of --output."""
    from clip_batch import encoders
    from clip_batch.plan.plan import load_plan
    from clip_batch.storage.store import Store

    how, stored = options.plan, options.storage.storage_options
    if options.target.output:
        spec = load_plan(Store(options.target.output, stored)).encoder
        found = encoders.resolve(spec.model, spec.pretrained, spec.preprocess, spec.precision, stored)
        encoders.check(found.weights, spec)
    else:
        found = encoders.resolve(how.model, how.pretrained, how.preprocess, how.precision, stored)
    text = f"{found.model} {found.pretrained}".strip() + f" is on this machine: {found.weights[:12]}"
    answer(options, {**asdict(found), "fingerprint": found.fingerprint}, text)
    return 0


def embed(options: Options) -> int:
    """Embed every uncommitted partition on this machine; with --input, plan first."""
    from clip_batch.launch import local

    if options.plan.input:
        say(planned(options)[1])
    workers = processes(options)
    if workers <= 1:
        return report(options, local.run_worker(options.output, None, options.embed, options.storage))
    return local.run_workers(options.output, workers, options.embed, options.storage)


def processes(options: Options) -> int:
    """Processes that embed on this machine."""
    from clip_batch.encoders.device import gpus

    return options.target.workers or (gpus() if options.embed.device in ("auto", "cuda") else 0)


def worker(options: Options) -> int:
    """One worker: the partitions given, or those of its slot, that are not committed yet."""
    from clip_batch.launch import local

    target = options.target
    if bool(target.partitions) == (target.slot is not None):
        raise ConfigError("worker needs either --partitions 0,3-5, or --slot I with --slots N or --submission ID")
    work = _slot(target) if target.slot is not None else _numbers(target.partitions)
    return report(options, local.run_worker(options.output, work, options.embed, options.storage))


def _numbers(text: str) -> list[int]:
    from clip_batch.types import parse_numbers

    try:
        return parse_numbers(text)
    except ValueError:
        raise ConfigError(f"--partitions {text!r} is not understood: write it like 0,3-5") from None


def _slot(target: TargetConfig) -> Slot:
    """The slot of a submission, or of the whole plan."""
    from clip_batch.embeddings.slots import Slot

    assert target.slot is not None
    if bool(target.submission) == (target.slots is not None):
        raise ConfigError("--slot needs --slots N, how many workers share the plan, or --submission ID")
    return Slot(target.slot, target.slots or 0, target.submission)


def report(options: Options, outcomes: Sequence[Outcome]) -> int:
    """Say what became of partitions; 1 if some failed."""
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    for outcome in failed:
        print(f"partition {outcome.partition} failed: {outcome.error}", file=sys.stderr)
    rows, bad = sum(outcome.rows for outcome in outcomes), sum(outcome.failed for outcome in outcomes)
    text = f"{len(outcomes) - len(failed)} partitions done, {rows:,} samples embedded, {bad:,} listed as failed"
    answer(options, [asdict(outcome) for outcome in outcomes], text)
    return 1 if failed else 0
