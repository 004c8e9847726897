"""What a Spark task does on an executor: a slot of embed, or a task of merge.

Only what Spark cannot say through its API is here: which GPU, which encoder is loaded already, and
what is raised (Spark tries again) or answered (it does not).
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from clip_batch import encoders
from clip_batch.config import EmbedConfig, MergeConfig, StorageConfig
from clip_batch.embeddings.commits import read_commit
from clip_batch.embeddings.embed import Outcome, compiled_size, embed
from clip_batch.embeddings.submission import Submission
from clip_batch.embeddings.workers import WorkerRun
from clip_batch.errors import ClipBatchError, ConfigError, StorageUnavailable
from clip_batch.plan.plan import load_plan
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec, Plan

if TYPE_CHECKING:
    from clip_batch.encoders import Encoder


@dataclass(frozen=True)
class Status:
    """One partition after a task: "committed", by whichever attempt, or "failed".

    `rows`, `failed` and `seconds` are the commit's, `worker` its host. `again` tells that the fault
    was not the data's, so that another try may help.
    """

    partition: int
    state: str
    rows: int = 0
    failed: int = 0
    seconds: float = 0.0
    worker: str = ""
    error: str = ""
    again: bool = False


@dataclass(frozen=True)
class EmbedTask:
    """What every embed task needs; travels in the pickled function, which no log and no page shows.

    `tries` is how often Spark lets a task fail before it aborts the job.
    """

    output: str
    submission: Submission
    config: EmbedConfig
    storage: StorageConfig
    application: str
    tries: int


def embed_slot(work: EmbedTask, slots: Sequence[int], number: int) -> list[dict[str, Any]]:
    """The partitions of slot `slots[number]`: the fields of a `Status` for each, whoever committed it.

    What lies with the machine or the store raises RuntimeError, so that Spark tries again, best
    elsewhere, but only when the slot's other partitions are done. Of the attempts that Spark allows,
    the last but one answers instead. The last one, which exists because processes died, gives up
    untried: one more death would abort the job of all slots.
    """
    from pyspark import TaskContext

    context: Any = TaskContext.get()
    attempt, slot = context.attemptNumber(), slots[number]
    numbers = work.submission.slot(slot)
    store = Store(work.output, work.storage.storage_options)
    done: dict[int, Status] = {}
    try:
        plan = load_plan(store)
        done.update(_committed(store, plan, numbers))
        todo = [partition for partition in numbers if partition not in done]
        if todo and attempt and attempt + 1 >= work.tries:
            raise RuntimeError(f"{attempt} attempts died or were taken away: the executors' logs tell why")
        run = WorkerRun(f"spark {work.application} slot {slot} attempt {attempt}")
        outcomes = _embed(work, plan, todo, run, context) if todo else []
        done.update(_committed(store, plan, todo))
        tried = {outcome.partition for outcome in outcomes}
        message = "not tried: the worker gave up before"
        outcomes += [Outcome(one, "failed", error=message, again=True) for one in todo if one not in tried]
    except (ClipBatchError, OSError, RuntimeError) as error:
        message = f"{type(error).__name__}: {error}"
        outcomes = [Outcome(partition, "failed", error=message, again=True) for partition in numbers]
    left = [outcome for outcome in outcomes if outcome.partition not in done]
    for outcome in left:
        if outcome.again and attempt + 2 < work.tries:
            raise RuntimeError(f"partition {outcome.partition}: {outcome.error}")
    failed = [Status(outcome.partition, "failed", error=outcome.error, again=outcome.again) for outcome in left]
    return [asdict(status) for status in (*done.values(), *failed)]


def _committed(store: Store, plan: Plan, partitions: Iterable[int]) -> dict[int, Status]:
    """What the commits of these partitions say, as far as there are any."""
    found = {}
    for partition in partitions:
        try:
            commit = read_commit(store, plan.name(partition))
        except FileNotFoundError:
            continue
        failed, seconds = sum(commit.failed.values()), commit.finished - commit.started
        found[partition] = Status(partition, "committed", commit.rows, failed, seconds, commit.worker)
    return found


def _embed(work: EmbedTask, plan: Plan, todo: list[int], run: WorkerRun, context: Any) -> list[Outcome]:
    """`embed` with the task's cores, its GPU, and the process's encoder."""
    config = replace(work.config, threads=work.config.threads or context.cpus())
    if gpu := context.resources().get("gpu"):
        pin(gpu.addresses)
        config = replace(config, device="cuda:0" if config.device == "auto" else config.device)
    loaded = encoder(plan.encoder, config.device, json.dumps(work.storage.storage_options), compiled_size(config))
    return embed(work.output, config, todo, storage=work.storage, run=run, encoder=loaded)


def pin(addresses: Sequence[str]) -> None:
    """Show CUDA the GPUs of a task and no other; ConfigError where it may have started on others.

    The process outlives the task and CUDA reads the variable once, so each process is for one GPU.
    """
    wanted, shown = ",".join(addresses), os.environ.get("CUDA_VISIBLE_DEVICES")
    if "torch" in sys.modules and shown != wanted:
        raise ConfigError(
            f"a Python worker that has started on GPU {shown} was given GPU {wanted}: set "
            "spark.executor.resource.gpu.amount=1 and spark.task.cpus to spark.executor.cores, one worker an executor"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = wanted


@functools.lru_cache(maxsize=1)
def encoder(spec: EncoderSpec, device: str, options: str, compiled: int) -> Encoder:
    """The encoder of this process: Spark reuses its Python workers, so each loads it once."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
    line = f"process {os.getpid()} loads {spec.model} on {device}, CUDA_VISIBLE_DEVICES={shown}"
    print(f"clip-batch: {line}", file=sys.stderr, flush=True)
    return encoders.load(spec, device, json.loads(options), compiled)


def merge_task(
    output: str, index: str, config: MergeConfig, storage: StorageConfig, task: str, count: int, number: int
) -> list[dict[str, Any]]:
    """Task `number` of `count` of a merge's "train", "shards" or "manifest"; what stands is not done again.

    What trying again cannot mend is an answer, the error's name and message, and does not raise.
    """
    from clip_batch.index.merge import merge
    from clip_batch.index.merge.job import open_job

    try:
        job = open_job(output, index, config, storage)
        if merge.finished(job):
            pass
        elif task == "train":
            merge.train(job)
        elif task == "shards":
            for shard in range(number, job.shards, count):
                merge.build_shard(job, shard)
        else:
            merge.publish(job)
        return [{"version": job.version, "shards": job.shards}]
    except StorageUnavailable:  # Spark tries the task again
        raise
    except ClipBatchError as error:
        return [{"error": type(error).__name__, "message": str(error)}]
