"""Reading and checking the JSON body of a request."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from clip_batch.serve.http.errors import Refused

Model = TypeVar("Model", bound=BaseModel)

READ_SECONDS = 30.0
"""How long a request's body may take to arrive."""

MOST_VALUES = 400_000
"""Values in a body, about; one long text, such as an image, is one value."""

MOST_FIELDS = 200
"""Fields of an object in a body."""

_PLAIN = {str, int, float, bool, type(None)}

_INLINE_BYTES = 64 * 1024
"""Bodies up to this size are parsed on the event loop, larger ones in a thread so that they delay no other request."""


async def read_body(request: Request, model: type[Model], limit: int) -> Model:
    """Return the JSON body of a request as a `model`; the content type is not checked.

    Raises Refused: 413 if the body is larger than `limit` bytes, 408 if it does not arrive in time, 422 if it does not
    fit the model.
    """
    too_large = Refused(413, f"a request may have {limit} bytes at most")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the request's body did not arrive within {READ_SECONDS:.0f} s") from None
    except ClientDisconnect:
        raise Refused(400, "the client closed the connection") from None
    try:
        if len(body) <= _INLINE_BYTES:
            return model.model_validate_json(body)
        return await asyncio.to_thread(_large, body, model)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or None
        unknown = first["type"] == "extra_forbidden"
        reason = "a request has no such field; /openapi.json lists those it has" if unknown else first["msg"]
        raise Refused(422, f"{field or 'request'}: {reason.removeprefix('Value error, ')}", field) from None


def _large(body: bytearray, model: type[Model]) -> Model:
    """Return a large JSON body as a `model`. Blocks.

    pydantic collects all errors, and holds Python's lock meanwhile. So it gets no body that could have very many:
    Refused, 413 for too many values, 422 for an object with too many fields.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise Refused(413, f"a request may have {MOST_VALUES} values at most")
    with contextlib.suppress(ValueError, RecursionError):  # no JSON: the model says where
        _check_fields(json.loads(body))
    return model.model_validate_json(body)


def _check_fields(value: Any) -> None:
    """Raise Refused (422) if an object within parsed JSON has more fields than any request's."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if len(value) > MOST_FIELDS:
                raise Refused(422, f"request: an object has {len(value)} fields, more than {MOST_FIELDS}")
            left += value.values()
        elif isinstance(value, list) and not set(map(type, value)) <= _PLAIN:
            left += value


async def disconnected(request: Request) -> None:
    """Return when the client of a request, whose body was read, has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
