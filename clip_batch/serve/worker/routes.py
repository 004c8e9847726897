"""The routes of the worker service. Each returns what is committed, or starts the work and waits for it.

The worker remembers nothing beyond its running job, so a request can be sent again, to this worker or another one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, ParamSpec, TypeVar

from fastapi import APIRouter, Request, Response

from clip_batch.config import MergeConfig, PlanConfig
from clip_batch.embeddings.status import status
from clip_batch.errors import ClipBatchError
from clip_batch.serve.http.errors import Refused
from clip_batch.serve.http.openapi import REFUSALS, takes
from clip_batch.serve.http.requests import read_body
from clip_batch.serve.http.responses import Problem, json_response
from clip_batch.serve.worker.jobs import AGAIN
from clip_batch.serve.worker.schema import EmbedWork, MergeWork, PlanWork, StageFields, section_of
from clip_batch.serve.worker.stages import Stages, refused

P = ParamSpec("P")
T = TypeVar("T")

MAX_BODY = 20_000_000
"""Bytes that a request may have; a plan may name many inputs."""

_ANSWERS: dict[int | str, dict[str, Any]] = {
    **REFUSALS,
    202: {"description": "The work is in progress: send the same request again for its result."},
    403: {"model": Problem, "description": "A path is not below the folders that this worker allows."},
    409: {"model": Problem, "description": "Another task must run first."},
    415: {"model": Problem, "description": "The content type of the body is not application/json."},
}


def router(stages: Stages) -> APIRouter:
    """Return the routes over a worker's stages."""
    routes = APIRouter(prefix="/v1", responses=_ANSWERS)

    async def respond(
        request: Request, body: StageFields, what: str, work: Callable[[threading.Event], Mapping[str, Any]]
    ) -> Response:
        name = (what, body.model_dump_json(exclude={"wait"}))
        try:
            result = await stages.jobs.run(name, what, work, request, body.wait)
        except (ClipBatchError, OSError, RuntimeError, ValueError) as error:
            raise refused(error) from error
        if result is None:
            return json_response({"state": "running", "what": what}, 202, {"retry-after": str(AGAIN)})
        return json_response({"state": "done", **result})

    @routes.post("/plan", openapi_extra=takes(PlanWork, {"output": "/data/out", "input": ["/data/{000..999}.tar"]}))
    async def plan(request: Request) -> Response:
        """Freeze which tars are embedded, in which partitions and by which encoder. Repeating it changes nothing.

        Another plan takes the place of one of which nothing is committed.
        """
        body = await _body(request, PlanWork)
        await _checked(stages.check_plan, body.output, body.input, body.model, body.pretrained)
        config = section_of(PlanConfig, body)
        return await respond(request, body, f"plan {body.output}", lambda _: stages.plan(body.output, config))

    @routes.post("/embed", openapi_extra=takes(EmbedWork, {"output": "/data/out", "partition": 0}))
    async def embed(request: Request) -> Response:
        """Embed one partition and return its commit: rows, failures by reason, and files with their sha256."""
        body = await _body(request, EmbedWork)
        await _checked(stages.check_folders, output=body.output)
        commit = await _checked(stages.committed, body.output, body.partition)
        if commit is not None:
            return json_response({"state": "done", **commit})
        what = f"embed {body.output}, partition {body.partition}"
        return await respond(request, body, what, lambda stop: stages.embed(body.output, body.partition, stop))

    @routes.post("/merge", openapi_extra=takes(MergeWork, {"output": "/data/out", "index": "/data/index"}))
    async def merge(request: Request) -> Response:
        """Run a task of a merge and return its record or the manifest. All tasks of a merge need the same options."""
        body = await _body(request, MergeWork)
        outputs = [body.output] if isinstance(body.output, str) else body.output
        for output in outputs:
            await _checked(stages.check_folders, output=output)
        await _checked(stages.check_folders, index=body.index)
        config = section_of(MergeConfig, body)
        what = f"merge {' '.join(outputs)} {body.task} {'' if body.shard is None else body.shard}".rstrip()
        return await respond(request, body, what, lambda _: stages.merge(body, config))

    @routes.get("/status")
    async def report(output: str) -> Response:
        """The report of `clip-batch status --json` on OUT."""
        await _checked(stages.check_folders, output=output)
        return json_response(asdict(await _checked(lambda: status(stages.store(output)))))

    return routes


async def _checked(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what a call in a thread returns. Raises Refused in place of its errors."""
    try:
        return await asyncio.to_thread(call, *args, **kwargs)
    except (ClipBatchError, OSError) as error:
        raise refused(error) from error


async def _body(request: Request, model: type[Any]) -> Any:
    """Return a request's body as a `model`. Raises Refused (415) if its content type is not JSON.

    A web page can make a browser send any other content type to this worker without asking it first.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "send content-type: application/json")
    return await read_body(request, model, MAX_BODY)
