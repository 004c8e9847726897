"""submit: freeze what is missing as a submission, and hand it to a scheduler."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from clip_batch.config import (
    EmbedConfig,
    MergeConfig,
    SlurmConfig,
    SparkConfig,
    StorageConfig,
    SubmitConfig,
)
from clip_batch.config.options import to_flags
from clip_batch.embeddings import submission
from clip_batch.embeddings.commits import committed
from clip_batch.plan import paths
from clip_batch.plan.plan import count_partitions
from clip_batch.storage.paths import absolute, local_path
from clip_batch.storage.store import Store

Say = Callable[[str], None]


@dataclass(frozen=True)
class SubmitRequest:
    """What a scheduler is to run: embed what OUT lacks, then merge it into `index` unless that is ""."""

    output: str
    index: str
    storage: StorageConfig
    submit: SubmitConfig
    embed: EmbedConfig
    merge: MergeConfig

    @property
    def store(self) -> Store:
        """OUT."""
        return Store(self.output, self.storage.storage_options)

    def draft(self, scheduler: str, config: SlurmConfig | SparkConfig, workers: int = 1) -> submission.Submission:
        """A submission of what is missing now, to tasks of `workers` processes each; it is not frozen yet."""
        words = ["clip-batch", "submit", scheduler, "--output", self.store.url]
        words += ["--index", absolute(self.index)] if self.index else []
        sections = (replace(self.submit, dry_run=False, wait=False), config, self.embed, self.merge)
        command = shlex.join(words + [word for section in sections for word in to_flags(section)])
        return submission.draft(submission.missing(self.store), scheduler, self.submit.tasks, workers, command)

    def freeze(self, draft: submission.Submission) -> None:
        """Publish the submission, and put the storage options into this process's environment, which its tasks inherit.

        In the environment, no script, pickle or command line shows a credential.
        """
        if options := self.storage.storage_options:
            os.environ["CLIP_BATCH_STORAGE_OPTIONS"] = json.dumps(options)
        submission.publish(self.store, draft)


def submit_to_slurm(request: SubmitRequest, config: SlurmConfig, main: Callable[..., int], say: Say) -> int:
    """Submit job arrays that run `main`, the command line, through submitit; returns the exit code.

    ConfigError: sbatch refuses.
    """
    from clip_batch.launch import slurm

    store, workers = request.store, config.nodes * config.tasks_per_node
    draft = request.draft("slurm", config, workers)
    folder = local_path(config.logs or (store.path(paths.LOGS) if store.local else "clip-batch-logs"))
    worker = ["worker", "--output", store.url, "--submission", draft.id, *to_flags(request.embed)]
    merge: list[str] = []
    if request.index:
        merge = ["merge", "--output", store.url, "--index", absolute(request.index), *to_flags(request.merge)]
    steps = slurm.chain(worker, draft.slots, workers, merge, request.submit.merge_tasks, draft.id)
    logs = Path(folder).absolute() / draft.id
    if request.submit.dry_run:
        for script in slurm.scripts(steps, config, logs):
            print(script)
        return 0
    if not steps:
        say("nothing is missing")
        return 0
    tell_idle(request, workers, say)
    request.freeze(draft)
    slurm.submit(steps, main, config, logs, say)
    say(f"logs: {logs}; progress: clip-batch status --output {shlex.quote(store.url)}")
    if not request.submit.wait:
        return 0
    slurm.wait(steps, lambda: _progress(store), say)
    return _complete(request, say)


def submit_to_spark(request: SubmitRequest, config: SparkConfig, say: Say) -> int:
    """Run a Spark application through spark-submit until it ends; returns its exit code."""
    from clip_batch.launch import spark

    draft = request.draft("spark", config)
    arguments = ["--output", request.store.url, "--submission", draft.id, *to_flags(request.embed)]
    if request.index:
        arguments += ["--index", absolute(request.index), *to_flags(request.merge)]
        arguments += ["--merge-tasks", str(request.submit.merge_tasks)]
    command = spark.command(config, arguments)
    if request.submit.dry_run:
        print(shlex.join(command))
        return 0
    if not draft.slots and not request.index:
        say("nothing is missing")
        return 0
    tell_idle(request, 1, say)
    request.freeze(draft)
    say(shlex.join(command))
    return spark.submit(command)


def tell_idle(request: SubmitRequest, workers: int, say: Say) -> None:
    """Say so where there are fewer partitions to embed than workers that are asked for."""
    asked = request.submit.tasks * workers
    missing = len(submission.missing(request.store))
    if 0 < missing < asked:
        say(
            f"only {missing:,} partitions are missing, fewer than the {asked:,} workers that are asked for: "
            f"{asked - missing:,} would be idle; before anything is committed, plan again with --partition-count"
        )


def _progress(store: Store) -> str:
    return f"{len(committed(store)):,} of {count_partitions(store):,} partitions done"


def _complete(request: SubmitRequest, say: Say) -> int:
    """The exit code: 0 if every partition is committed and, with an index, merged; 1 otherwise, saying what is not."""
    from clip_batch.embeddings.status import describe, status
    from clip_batch.index.merge.job import open_job
    from clip_batch.index.merge.merge import finished

    state = status(request.store)
    say(describe(state))
    if state.missing or (state.empty and not request.embed.allow_empty):
        return 1
    if request.index and not finished(open_job(request.output, request.index, request.merge, request.storage)):
        say(f"{request.index} is not merged: see the logs of the merge tasks")
        return 1
    return 0
