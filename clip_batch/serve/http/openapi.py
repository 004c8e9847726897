"""The description at /openapi.json. `requests.read_body` reads the bodies, so FastAPI must be told of their models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from clip_batch.serve.http.limits import COOKIE, OPEN_PATHS
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


_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "cookie": {"type": "apiKey", "in": "cookie", "name": COOKIE},
}
"""The two ways to send the token."""


def takes(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """Return the `openapi_extra` of a route whose body is a `model`."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI, bodies: Sequence[type[BaseModel]], token: bool) -> None:
    """Add to what `app.openapi` returns: the bodies' models, names of operations, and whether a `token` is needed."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, models = models_json_schema([(model, "validation") for model in bodies], ref_template=_REFERENCE)
            schema.setdefault("components", {}).setdefault("schemas", {}).update(models["$defs"])
            schema["components"]["securitySchemes"] = _SCHEMES
            schema["security"] = [{name: []} for name in _SCHEMES] if token else [{}]
            for path, operations in schema["paths"].items():
                for method, operation in operations.items():
                    operation["operationId"] = _name(method, path)
                    if path in OPEN_PATHS:
                        operation["security"] = [{}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _name(method: str, path: str) -> str:
    """Return the name of an operation, such as `post_v1_search`."""
    return "_".join([method, *re.findall(r"[A-Za-z0-9]+", path)])
