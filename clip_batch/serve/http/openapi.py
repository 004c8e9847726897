"""The description at /openapi.json. `requests.read_body` reads the bodies, so FastAPI must be told of their models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from clip_batch.serve.http.responses import Problem

_REASONS = {
    400: "The request does not fit this index or this server.",
    401: "A token is needed.",
    404: "There is no such index or row.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    422: "The request is not understood.",
    429: "Too many requests from this client.",
    503: "Too many requests are in progress, or the index is not open.",
}

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": reason} for status, reason in _REASONS.items()
}
"""OpenAPI's `responses` of the errors that any route may answer with."""

_REFERENCE = "#/components/schemas/{model}"


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """Return the `openapi_extra` of a route whose body is a `model`."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Add the models of the bodies to what `app.openapi` returns."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, models = models_json_schema([(model, "validation") for model in bodies], ref_template=_REFERENCE)
            schema.setdefault("components", {}).setdefault("schemas", {}).update(models["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
