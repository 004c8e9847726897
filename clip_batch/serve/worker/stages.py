"""plan, embed and merge as the worker service runs them: each returns what is committed."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypedDict

from clip_batch.config import EmbedConfig, MergeConfig, PlanConfig, StorageConfig
from clip_batch.embeddings import embed as embed_stage
from clip_batch.embeddings.commits import read_commit
from clip_batch.embeddings.loading import load_encoder
from clip_batch.embeddings.workers import WorkerRun
from clip_batch.encoders import Model
from clip_batch.errors import (
    ClipBatchError,
    ConfigError,
    EncoderError,
    IncompleteError,
    InputError,
    PlanError,
    Preempted,
    StorageUnavailable,
    one_line,
)
from clip_batch.index.merge import merge as merge_stage
from clip_batch.index.merge.job import MergeJob, ShardRecord, TemplateRecord, open_job
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.plan.stored import read_generations
from clip_batch.serve.http.errors import Busy, Refused
from clip_batch.serve.worker.allow import Allowed
from clip_batch.serve.worker.jobs import AGAIN, Jobs
from clip_batch.serve.worker.schema import MergeTask
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec, generation_of, partition_name


class PlanAnswer(TypedDict):
    """The frozen plan: how many partitions it has, its digest, and the encoder's fingerprint."""

    partitions: int
    digest: str
    encoder: str


class EmbedAnswer(TypedDict):
    """The commit of a partition, as commits/<partition>.json has it."""

    commit: dict[str, Any]


class MergeAnswer(TypedDict, total=False):
    """The version of a merge; its manifest if it is complete, otherwise the record of the task that ran."""

    version: str
    index_shards: int
    manifest: dict[str, Any]
    record: TemplateRecord | ShardRecord | None


class Stages:
    """The state that the routes share: options, the encoder that was loaded last, and the job that is running."""

    def __init__(self, allowed: Allowed, config: EmbedConfig, storage: StorageConfig) -> None:
        self.allowed, self.config, self.storage = allowed, config, storage
        self.jobs = Jobs()
        self._encoder: tuple[str, Model] | None = None

    def store(self, url: str) -> Store:
        """Return the store at a URL, opened with this worker's storage options."""
        return Store(url, self.storage.storage_options)

    def check_folders(self, **named: str) -> None:
        """Raise Refused (403) unless folders, by the fields that name them, are allowed, and so is all in them."""
        for field, folder in named.items():
            self.allowed.check_trees([folder], field)

    def check_plan(self, output: str, input: Sequence[str], model: str, pretrained: str) -> None:
        """Raise Refused (403) unless all that planning opens is allowed; 400 for a list of inputs."""
        self.check_folders(output=output)
        for number, spec in enumerate(input):
            self.allowed.check_input(spec, f"input.{number}")
        self.allowed.check_model(model, pretrained)

    def plan(self, output: str, config: PlanConfig) -> PlanAnswer:
        """Freeze a plan in OUT. Return the one that is there if it is the same; replace it if nothing is committed."""
        plan = make_plan(config.input, output, config, storage=self.storage)
        return {"partitions": len(plan.partitions), "digest": plan.digest, "encoder": plan.encoder.fingerprint}

    def committed(self, output: str, partition: int) -> EmbedAnswer | None:
        """Return a partition's commit, or None if there is none. Raises PlanError if there is no such partition."""
        store = self.store(output)
        generations = read_generations(store)
        if partition >= generations[-1].stop:
            raise PlanError(f"partition {partition} does not exist: the plan has 0 to {generations[-1].stop - 1}")
        try:
            return {
                "commit": asdict(
                    read_commit(store, partition_name(partition, generation_of(generations, partition).stop))
                )
            }
        except FileNotFoundError:
            return None

    def embed(self, output: str, partition: int, stop: threading.Event) -> EmbedAnswer:
        """Embed a partition and return its commit, which another worker may have written first.

        Raises Refused (422) if the data made it fail, and Busy if this machine did.
        """
        plan = load_plan(self.store(output))
        self.allowed.check_trees({piece.shard.url for piece in plan.partitions[partition].slices}, "output")
        self.allowed.check_model(plan.encoder.model, plan.encoder.pretrained, ("output", "output"))
        run = WorkerRun("http", stop=stop)
        encoder = self._load(plan.encoder)
        outcomes = embed_stage.embed(output, self.config, [partition], storage=self.storage, run=run, encoder=encoder)
        for outcome in outcomes:
            if outcome.state == "failed":
                what = f"partition {partition} failed: {outcome.error}"
                raise Busy(what, after=AGAIN) if outcome.again else Refused(422, what, "partition")
        commit = self.committed(output, partition)
        assert commit is not None
        return commit

    def _load(self, spec: EncoderSpec) -> Model:
        """Return the encoder, which stays loaded until a request needs another one."""
        if self._encoder is None or self._encoder[0] != spec.fingerprint:
            self._encoder = None  # free its memory before the next one is loaded
            encoder = load_encoder(spec, self.config, self.storage.storage_options)
            self._encoder = spec.fingerprint, encoder
        return self._encoder[1]

    def merge(self, request: MergeTask, config: MergeConfig) -> MergeAnswer:
        """Run a task of a merge and return its record, or the version's manifest once the version is complete."""
        job = open_job(request.output, request.index, config, self.storage)
        whole = request.task == "all"
        manifest = merge_stage.run_all(job) if whole else merge_stage.finished(job, rebuild=request.task == "train")
        if manifest is None:
            if request.task == "train":
                merge_stage.train(job)
            for shard in _shards(job, request):
                merge_stage.build_shard(job, shard)
            if request.task == "manifest":
                manifest = merge_stage.publish(job)
        version: MergeAnswer = {"version": job.version, "index_shards": job.shards}
        if manifest is not None:
            return {**version, "manifest": json.loads(manifest.to_json())}
        record = job.template_record() if request.shard is None else job.shard_record(request.shard)
        return {**version, "record": record}


def _shards(job: MergeJob, request: MergeTask) -> range:
    """Return the index shards that the request builds. Raises ConfigError if its shard does not exist."""
    if request.task != "shard":
        return range(0)
    if request.shard is None or request.shard >= job.shards:
        raise ConfigError(f"task shard needs a shard: version {job.version} has 0 to {job.shards - 1}")
    return range(request.shard, request.shard + 1)


def refused(error: Exception) -> Refused:
    """Return how an error of a stage is answered.

    400: the request must be corrected. 409: another task must run first. 422: the data is at fault. 503: try again.
    """
    if isinstance(error, Refused):
        return error
    if isinstance(error, (ConfigError, PlanError, EncoderError, InputError)):
        return Refused(400, str(error))
    if isinstance(error, IncompleteError):
        return Refused(409, str(error))
    if isinstance(error, Preempted):
        return Busy("the job was stopped, and nothing is half done", after=AGAIN)
    if isinstance(error, ClipBatchError) and not isinstance(error, StorageUnavailable):
        return Refused(422, str(error))
    return Busy(one_line(f"{type(error).__name__}: {error}"), after=AGAIN)
