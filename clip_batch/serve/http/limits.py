"""What is checked before any work is done: who asks, how often, how many at once, how much."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from clip_batch.serve.http.errors import Busy, Refused

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from clip_batch.config import ServeConfig
    from clip_batch.serve.http.metrics import Traffic

Model = TypeVar("Model", bound=BaseModel)

COOKIE = "clip_batch_token"
"""The token may come as this cookie too: an <img> sends no header."""

OPEN = ("/", "/healthz", "/readyz")
"""Paths that need no token and never wait: the page (which asks for the token), and what watches the service.
So do those under /page/."""

READ_SECONDS = 30.0
"""For a request's body to arrive."""

_INLINE = 64 * 1024
"""Bytes of JSON that are parsed at once; more of them in a thread, as they could hold the others up."""

CLIENTS = 10_000
"""Addresses whose rate is known; the one that was quiet longest is forgotten first."""


def answer(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in UTF-8. ValueError where data holds NaN or infinity."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode(errors="replace"), status, headers, "application/json")


def refusal(error: Refused) -> Response:
    """The answer to a refused request: {"detail": what is wrong, "field": where}."""
    headers = {}
    if isinstance(error, Busy):
        headers["retry-after"] = str(error.after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return answer({"detail": str(error), "field": error.field}, error.status, headers)


async def read(request: Request, model: type[Model], limit: int) -> Model:
    """A request's JSON body, whatever its content type. Refused: 413 over `limit` bytes, 408 late, 422 wrong."""
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
        raise Refused(400, "the client went away") from None
    try:
        if len(body) <= _INLINE:
            return model.model_validate_json(bytes(body))
        return await asyncio.to_thread(model.model_validate_json, bytes(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or None
        raise Refused(422, f"{field or 'request'}: {first['msg'].removeprefix('Value error, ')}", field) from None


class Rate:
    """A token bucket a client: `rate` requests a second, `burst` at once. `clock` is in seconds."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> float:
        """0 if the client may ask now, and then its bucket has one less; else seconds until it may."""
        now = self._clock()
        level, then = self._buckets.pop(client, (float(self._burst), now))
        level = min(self._burst, level + (now - then) * self._rate)
        allowed = level >= 1
        self._buckets[client] = (level - 1 if allowed else level, now)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - level) / self._rate


class Guard:
    """ASGI middleware: token, rate, requests at once; and it counts and times what is answered."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Traffic) -> None:
        self._app, self._config, self._metrics = app, config, metrics
        self._rate = Rate(config.rate, config.rate_burst) if config.rate else None
        self._pending = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), [500]

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            await self._checked(scope, receive, watch)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status[0]).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN or scope["path"].startswith("/page/"):
            await self._app(scope, receive, send)
            return
        try:
            self._admit(scope)
        except Refused as error:
            await refusal(error)(scope, receive, send)
            return
        self._pending += 1
        self._metrics.pending.set(self._pending)
        try:
            await self._app(scope, receive, send)
        finally:
            self._pending -= 1
            self._metrics.pending.set(self._pending)

    def _admit(self, scope: Scope) -> None:
        if self._config.token and not _knows(scope, self._config.token):
            raise Refused(401, "this service wants a token: send Authorization: Bearer TOKEN")
        if self._rate is not None and (wait := self._rate.wait((scope.get("client") or ("",))[0])):
            raise Busy(f"more than {self._config.rate:g} requests a second", 429, max(1, round(wait + 0.5)))
        if self._pending >= self._config.max_pending:
            raise Busy(f"{self._pending} requests are at work")


def _knows(scope: MutableMapping[str, Any], token: str) -> bool:
    headers = dict(scope["headers"])
    given = headers.get(b"authorization", b"")
    kind, _, value = given.partition(b" ")
    if kind.lower() != b"bearer":
        try:
            cookies = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1"))
        except CookieError:
            return False
        value = cookies[COOKIE].value.encode() if COOKIE in cookies else b""
    return hmac.compare_digest(value.strip(), token.encode())
