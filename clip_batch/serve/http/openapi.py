"""/openapi.json: bodies are read by `limits.read`, so FastAPI must be told of their models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from clip_batch.serve.search.schema import Problem

_WHY = {
    400: "The request does not fit this index or this server.",
    401: "A token is needed.",
    404: "There is no such index or row.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    422: "The request is not understood.",
    429: "Too many requests from this client.",
    503: "Too many requests at work, or the index is not open.",
}

REFUSALS: dict[int | str, dict[str, Any]] = {code: {"model": Problem, "description": why} for code, why in _WHY.items()}
"""What any route may answer instead of 200."""

_WHERE = "#/components/schemas/{model}"


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """What a route's `openapi_extra` says of its body."""
    schema = {"$ref": _WHERE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Let `app.openapi` define the models of bodies."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, models = models_json_schema([(model, "validation") for model in bodies], ref_template=_WHERE)
            found.setdefault("components", {}).setdefault("schemas", {}).update(models["$defs"])
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
