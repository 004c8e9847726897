"""plan, embed and merge as requests, each answered with the reference of what is committed.

Whatever is committed is answered at once; nothing else is remembered, so a request can be repeated anywhere.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import threading
import typing
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, create_model

from clip_batch import encoders
from clip_batch.config import EmbedConfig, MergeConfig, PlanConfig, StorageConfig
from clip_batch.config.options import default, helps
from clip_batch.embeddings import embed as embed_stage
from clip_batch.embeddings.commits import read_commit
from clip_batch.embeddings.status import status
from clip_batch.embeddings.workers import WorkerRun
from clip_batch.encoders import Encoder
from clip_batch.errors import (
    ClipBatchError,
    ConfigError,
    EncoderError,
    IncompleteError,
    InputError,
    PlanError,
    Preempted,
    one_line,
)
from clip_batch.index.merge import merge as merge_stage
from clip_batch.index.merge.job import MergeJob, open_job
from clip_batch.plan.plan import count_partitions, load_plan, make_plan
from clip_batch.search.filters import RequestModel as Fields
from clip_batch.serve.http.errors import Busy, Refused
from clip_batch.serve.http.limits import answer, read
from clip_batch.serve.http.openapi import REFUSALS, takes
from clip_batch.serve.search.schema import Problem
from clip_batch.serve.worker.allow import Allowed
from clip_batch.serve.worker.jobs import AGAIN, Jobs
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec, partition_name

MOST_BYTES = 20_000_000
"""Of a request: a plan may name many inputs."""


class StageFields(Fields):
    """Base: which OUT, and how long to wait for an answer."""

    output: str = Field(max_length=4096, description="the embeddings folder OUT")
    wait: float | None = Field(
        None, ge=0, le=86_400, description="seconds, after which the answer is 202 and the work goes on; none: no end"
    )


class EmbedWork(StageFields):
    """One partition."""

    partition: int = Field(ge=0)


class MergeTask(StageFields):
    """A task of a merge: train, then each shard in any order, then manifest; or all of them."""

    index: str = Field(max_length=4096, description="the index folder INDEX")
    task: Literal["all", "train", "shard", "manifest"] = "all"
    shard: int | None = Field(None, ge=0, description="of `shard`: which index shard")


def _with_options(base: type[BaseModel], name: str, section: type) -> type[Any]:
    """A request model with the fields of an option section, their defaults and help."""
    hints = typing.get_type_hints(section)
    fields: dict[str, Any] = {
        option.name: (hints[option.name], Field(default(option), description=helps(section)[option.name]))
        for option in dataclasses.fields(section)
    }
    return create_model(name, __base__=base, __doc__=base.__doc__, **fields)


PlanWork = _with_options(StageFields, "PlanWork", PlanConfig)
MergeWork = _with_options(MergeTask, "MergeWork", MergeConfig)
MODELS: list[type[BaseModel]] = [PlanWork, EmbedWork, MergeWork]


class Stages:
    """What the routes work with: options, the encoder that was loaded last, the one job."""

    def __init__(self, allowed: Allowed, config: EmbedConfig, storage: StorageConfig) -> None:
        self.allowed, self.config, self.storage = allowed, config, storage
        self.jobs = Jobs()
        self._encoder: tuple[str, Encoder] | None = None

    def store(self, url: str) -> Store:
        return Store(url, self.storage.storage_options)

    def plan(self, output: str, config: PlanConfig) -> dict[str, Any]:
        """Freeze a plan, or find the same one standing."""
        made = make_plan(config, output, self.storage)
        return {"partitions": len(made.partitions), "digest": made.digest, "encoder": made.encoder.fingerprint}

    def committed(self, output: str, partition: int) -> dict[str, Any] | None:
        """A partition's commit; None where there is none. PlanError: there is no such partition."""
        store = self.store(output)
        count = count_partitions(store)
        if partition >= count:
            raise PlanError(f"partition {partition} does not exist: the plan has 0 to {count - 1}")
        try:
            return {"commit": asdict(read_commit(store, partition_name(partition, count)))}
        except FileNotFoundError:
            return None

    def embed(self, output: str, partition: int, stop: threading.Event) -> dict[str, Any]:
        """Embed a partition; its commit, whoever made it. Refused (422): the data is at fault; Busy: the machine."""
        plan = load_plan(self.store(output))
        for piece in plan.partitions[partition].slices:
            self.allowed.check(piece.shard.url, "output")
        run = WorkerRun("http", stop=stop)
        outcomes = embed_stage.embed(output, self.config, [partition], self.storage, run, self._load(plan.encoder))
        for outcome in outcomes:
            if outcome.state == "failed":
                what = f"partition {partition} failed: {outcome.error}"
                raise Busy(what, after=AGAIN) if outcome.again else Refused(422, what, "partition")
        found = self.committed(output, partition)
        assert found is not None
        return found

    def _load(self, spec: EncoderSpec) -> Encoder:
        """The encoder, loaded once for as long as requests ask for the same."""
        if self._encoder is None or self._encoder[0] != spec.fingerprint:
            self._encoder = None  # before the next one takes its memory
            size = embed_stage.compiled_size(self.config)
            found = encoders.load(spec, self.config.device, self.storage.storage_options, size)
            self._encoder = spec.fingerprint, found
        return self._encoder[1]

    def merge(self, asked: MergeTask, config: MergeConfig) -> dict[str, Any]:
        """Run a task of a merge; its record, or the manifest of the version once that stands."""
        job = open_job(asked.output, asked.index, config, self.storage)
        manifest = merge_stage.finished(job)
        if manifest is None:
            if asked.task in ("all", "train"):
                merge_stage.train(job, every_row=asked.task == "all")
            for shard in _shards(job, asked):
                merge_stage.build_shard(job, shard)
            if asked.task in ("all", "manifest"):
                manifest = merge_stage.publish(job)
        about = {"version": job.version, "index_shards": job.shards}
        if manifest is not None:
            return {**about, "manifest": json.loads(manifest.to_json())}
        return {**about, "record": job.trained() if asked.shard is None else job.built(asked.shard)}


def _shards(job: MergeJob, asked: MergeTask) -> range:
    if asked.task == "all":
        return range(job.shards)
    if asked.task != "shard":
        return range(0)
    if asked.shard is None or asked.shard >= job.shards:
        raise ConfigError(f"task shard needs a shard: version {job.version} has 0 to {job.shards - 1}")
    return range(asked.shard, asked.shard + 1)


def refused(error: Exception) -> Refused:
    """How an error of a stage is answered: 400 mend the request, 409 something else is due first, 503 try again."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, (ConfigError, PlanError, EncoderError, InputError)):
        return Refused(400, str(error))
    if isinstance(error, IncompleteError):
        return Refused(409, str(error))
    if isinstance(error, Preempted):
        return Busy("stopped, and nothing is half done", after=AGAIN)
    if isinstance(error, ClipBatchError):
        return Refused(422, str(error))
    return Busy(one_line(f"{type(error).__name__}: {error}"), after=AGAIN)


_ANSWERS: dict[int | str, dict[str, Any]] = {
    **REFUSALS,
    202: {"description": "It is at work: send the same request again for its end."},
    403: {"model": Problem, "description": "A path is not below what this worker allows."},
    409: {"model": Problem, "description": "Something else must be done first."},
    415: {"model": Problem, "description": "The body is not declared as application/json."},
}


def router(stages: Stages) -> APIRouter:
    """The routes over a worker's stages."""
    routes = APIRouter(prefix="/v1", responses=_ANSWERS)

    async def respond(
        request: Request, asked: Any, what: str, work: Callable[[threading.Event], dict[str, Any]]
    ) -> Response:
        name = (what, asked.model_dump_json(exclude={"wait"}))
        try:
            found = await stages.jobs.run(name, what, work, request, asked.wait)
        except (ClipBatchError, OSError, RuntimeError, ValueError) as error:
            raise refused(error) from error
        if found is None:
            return answer({"state": "running", "what": what}, 202, {"retry-after": str(AGAIN)})
        return answer({"state": "done", **found})

    @routes.post("/plan", openapi_extra=takes(PlanWork))
    async def plan(request: Request) -> Response:
        """Freeze which tars are embedded, in which partitions, by which encoder; again, it changes nothing."""
        asked = await _body(request, PlanWork)
        stages.allowed.check(asked.output, "output")
        for number, spec in enumerate(asked.input):
            stages.allowed.check_input(spec, f"input.{number}")
        if asked.model.startswith("local-dir:"):
            stages.allowed.check(asked.model.removeprefix("local-dir:"), "model")
        if "/" in asked.pretrained or os.path.exists(asked.pretrained):
            stages.allowed.check(asked.pretrained, "pretrained")
        config = _section(PlanConfig, asked)
        return await respond(request, asked, f"plan {asked.output}", lambda _: stages.plan(asked.output, config))

    @routes.post("/embed", openapi_extra=takes(EmbedWork))
    async def embed(request: Request) -> Response:
        """Embed one partition; its commit: rows, failures by reason, files with their sha256."""
        asked = await _body(request, EmbedWork)
        stages.allowed.check(asked.output, "output")
        try:
            found = await _aside(stages.committed, asked.output, asked.partition)
        except (ClipBatchError, OSError) as error:
            raise refused(error) from error
        if found is not None:
            return answer({"state": "done", **found})
        what = f"embed {asked.output}, partition {asked.partition}"
        return await respond(request, asked, what, lambda stop: stages.embed(asked.output, asked.partition, stop))

    @routes.post("/merge", openapi_extra=takes(MergeWork))
    async def merge(request: Request) -> Response:
        """Run a task of a merge; its record, or the manifest. All tasks of a merge need the same options."""
        asked = await _body(request, MergeWork)
        stages.allowed.check(asked.output, "output")
        stages.allowed.check(asked.index, "index")
        config = _section(MergeConfig, asked)
        what = f"merge {asked.output} {asked.task} {'' if asked.shard is None else asked.shard}".rstrip()
        return await respond(request, asked, what, lambda _: stages.merge(asked, config))

    @routes.get("/status")
    async def report(output: str) -> Response:
        """What `clip-batch status --json` says of OUT."""
        stages.allowed.check(output, "output")
        try:
            return answer(await _aside(status, stages.store(output)))
        except (ClipBatchError, OSError) as error:
            raise refused(error) from error

    return routes


async def _body(request: Request, model: type[Any]) -> Any:
    """A request's body. Refused (415): it is not declared as JSON, so any web page could make a browser send it."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "send content-type: application/json")
    return await read(request, model, MOST_BYTES)


def _section(section: type, asked: Any) -> Any:
    return section(**{option.name: getattr(asked, option.name) for option in dataclasses.fields(section)})


async def _aside(call: Callable[..., Any], *arguments: Any) -> Any:
    """Run a short look at storage in a thread."""
    return await asyncio.to_thread(call, *arguments)
