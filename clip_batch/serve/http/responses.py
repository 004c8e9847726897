"""JSON responses, and the one form in which every error is answered."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from clip_batch.errors import ClipBatchError, ConfigError
from clip_batch.serve.http.errors import Busy, KnownProblem, Refused

log = logging.getLogger("clip_batch.serve")


class Problem(BaseModel):
    """Why a request was refused. `field` names the part of the request that is wrong, or is null if none is.

    `error` is there if the service waits for somebody to mend something: to ask again soon does not help.
    """

    detail: str
    field: str | None = None
    error: str | None = None


LATER = 5
"""Seconds after which a client may ask again where an error does not say."""


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return `data` as a JSON response in UTF-8. Raises ValueError if it contains NaN or infinity."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode(errors="replace"), status, headers, "application/json")


def refusal(error: Refused) -> Response:
    """Return the response to a refused request; its body is a `Problem`."""
    headers = {}
    if error.status == 503 or isinstance(error, Busy):
        headers["retry-after"] = str(getattr(error, "after", LATER))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    body = {"detail": str(error), "field": error.field}
    if isinstance(error, KnownProblem):
        body["error"] = error.problem
    return json_response(body, error.status, headers)


def answer_errors(app: FastAPI, shown: Callable[[str], str] = str) -> None:
    """Make `app` answer every error with a `Problem`. `shown` is what clients see of the text of other errors."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return refusal(error)

    @app.exception_handler(ClipBatchError)
    async def failed(_: Request, error: ClipBatchError) -> Response:
        status = 400 if isinstance(error, ConfigError) else 503
        if status == 503:
            log.error("%s", error)
        return refusal(Refused(status, shown(str(error)), getattr(error, "field", None)))

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        response = refusal(Refused(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first: dict[str, Any] = error.errors()[0]
        field = ".".join(map(str, first["loc"][1:]))
        return refusal(Refused(422, f"{field}: {first['msg']}", field))
