"""What a Spark task does on an executor: embed a slot, or run a task of a merge.

Spark has no API for some of this: pinning a GPU, reusing the encoder of the process, and which errors
to raise (Spark tries the task again) or to return (it does not).
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from clip_batch.config import EmbedConfig, MergeConfig, StorageConfig
from clip_batch.embeddings.commits import read_commit
from clip_batch.embeddings.embed import Outcome, embed
from clip_batch.embeddings.loading import load_encoder
from clip_batch.embeddings.submission import Submission
from clip_batch.embeddings.workers import WorkerRun
from clip_batch.errors import ClipBatchError, ConfigError, StorageUnavailable
from clip_batch.plan.plan import load_plan
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec, Plan

if TYPE_CHECKING:
    from clip_batch.encoders import Model


@dataclass(frozen=True)
class PartitionStatus:
    """One partition after a Spark task: whether it is committed, by whichever attempt.

    `rows`, `failed` (samples), `seconds` and `empty` are those of the commit, and `worker` is the host that made it.
    `again` says that the data is not to blame, so that another attempt may succeed.
    """

    partition: int
    state: Literal["committed", "failed"]
    rows: int = 0
    failed: int = 0
    seconds: float = 0.0
    worker: str = ""
    error: str = ""
    again: bool = False
    empty: str = ""


@dataclass(frozen=True)
class EmbedTask:
    """What all embed tasks of a job share. It travels in the pickled function, which no log and no page shows.

    `tries` is how often Spark lets a task fail before it aborts the job.
    """

    output: str
    submission: Submission
    config: EmbedConfig
    storage: StorageConfig
    application: str
    tries: int


def embed_slot(task: EmbedTask, slots: Sequence[int], number: int) -> list[dict[str, Any]]:
    """Embed the partitions of slot `slots[number]`; returns the fields of a `PartitionStatus` for each of them.

    When the slot's other partitions are done, a failure of the machine or the store raises RuntimeError, and Spark
    tries again, if possible elsewhere. That holds for attempts 0 to n - 3 of the n that Spark allows. Attempt n - 2
    returns the failure. Attempt n - 1 runs only if processes died, and returns at once: one more death would abort
    the job of all slots.
    """
    from pyspark import TaskContext

    context: Any = TaskContext.get()
    attempt, slot = context.attemptNumber(), slots[number]
    numbers = task.submission.slot(slot)
    store = Store(task.output, task.storage.storage_options)
    done: dict[int, PartitionStatus] = {}
    try:
        plan = load_plan(store)
        done.update(_committed(store, plan, numbers))
        todo = [partition for partition in numbers if partition not in done]
        if todo and attempt and attempt + 1 >= task.tries:
            raise RuntimeError(f"{attempt} attempts died or were taken away: the executors' logs tell why")
        run = WorkerRun(f"spark {task.application} slot {slot} attempt {attempt}")
        outcomes = _embed(task, plan, todo, run, context) if todo else []
        done.update(_committed(store, plan, todo))
        tried = {outcome.partition for outcome in outcomes}
        message = "not tried: the worker gave up before"
        outcomes += [Outcome(one, "failed", error=message, again=True) for one in todo if one not in tried]
    except (ClipBatchError, OSError, RuntimeError) as error:
        message = f"{type(error).__name__}: {error}"
        outcomes = [Outcome(partition, "failed", error=message, again=True) for partition in numbers]
    left = [outcome for outcome in outcomes if outcome.partition not in done]
    for outcome in left:
        if outcome.again and attempt + 2 < task.tries:
            raise RuntimeError(f"partition {outcome.partition}: {outcome.error}")
    failed = [
        PartitionStatus(outcome.partition, "failed", error=outcome.error, again=outcome.again) for outcome in left
    ]
    return [asdict(status) for status in (*done.values(), *failed)]


def _committed(store: Store, plan: Plan, partitions: Iterable[int]) -> dict[int, PartitionStatus]:
    """The status of each of these partitions that is committed."""
    statuses = {}
    for partition in partitions:
        try:
            commit = read_commit(store, plan.name(partition))
        except FileNotFoundError:
            continue
        failed, seconds = sum(commit.failed.values()), commit.finished - commit.started
        statuses[partition] = PartitionStatus(
            partition, "committed", commit.rows, failed, seconds, commit.worker, empty=commit.empty
        )
    return statuses


def _embed(task: EmbedTask, plan: Plan, todo: list[int], run: WorkerRun, context: Any) -> list[Outcome]:
    """Run `embed` with the cores and the GPU of a Spark task, and the encoder of this process."""
    config = replace(task.config, threads=task.config.threads or context.cpus())
    if gpu := context.resources().get("gpu"):
        pin(gpu.addresses)
        config = replace(config, device="cuda:0" if config.device == "auto" else config.device)
    loaded = encoder(plan.encoder, config, json.dumps(task.storage.storage_options))
    return embed(task.output, config, todo, storage=task.storage, run=run, encoder=loaded)


def pin(addresses: Sequence[str]) -> None:
    """Let CUDA see the GPUs of a task and no others; ConfigError if CUDA may have started on others.

    The process outlives the task, and CUDA reads the variable only once, so each process can use one GPU only.
    """
    assigned, visible = ",".join(addresses), os.environ.get("CUDA_VISIBLE_DEVICES")
    if "torch" in sys.modules and visible != assigned:
        raise ConfigError(
            f"a Python worker that has started on GPU {visible} was given GPU {assigned}: set "
            "spark.executor.resource.gpu.amount=1 and spark.task.cpus to spark.executor.cores, one worker an executor"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = assigned


@functools.lru_cache(maxsize=1)
def encoder(spec: EncoderSpec, config: EmbedConfig, options: str) -> Model:
    """The encoder of this process. Spark reuses its Python processes, so that each loads the encoder once."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
    line = f"process {os.getpid()} loads {spec.model} on {config.device}, CUDA_VISIBLE_DEVICES={visible}"
    print(f"clip-batch: {line}", file=sys.stderr, flush=True)
    return load_encoder(spec, config, json.loads(options))


def merge_task(
    output: str, index: str, config: MergeConfig, storage: StorageConfig, task: str, count: int, number: int
) -> list[dict[str, Any]]:
    """Run task `number` of `count` of a merge's "train", "shards" or "manifest" step, skipping what is done.

    An error that another attempt would meet again is returned, by its name and message, instead of raised.
    """
    from clip_batch.index.merge import merge
    from clip_batch.index.merge.job import open_job

    try:
        job = open_job(output, index, config, storage)
        version = job.version
        if manifest := merge.finished(job, rebuild=task == "train"):
            version = manifest.version
        elif task == "train":
            merge.train(job)
        elif task == "shards":
            for shard in range(number, job.shards, count):
                merge.build_shard(job, shard)
        else:
            merge.publish(job)
        return [{"version": version, "shards": job.shards}]
    except StorageUnavailable:  # Spark tries the task again
        raise
    except ClipBatchError as error:
        return [{"error": type(error).__name__, "message": str(error)}]
