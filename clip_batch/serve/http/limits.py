"""Checks before a request is handled: its token, the client's request rate, and the number of requests in progress."""

from __future__ import annotations

import contextlib
import hmac
import re
import time
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from clip_batch.config import parse_bytes
from clip_batch.serve.http.errors import Busy, Refused
from clip_batch.serve.http.responses import refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from clip_batch.config import ServeConfig
    from clip_batch.serve.http.metrics import Traffic

COOKIE = "clip_batch_token"
"""The cookie that may carry the token instead of a header, since a browser sends no header for an <img>."""

OPEN_PATHS = ("/", "/healthz", "/readyz")
"""Paths that need no token and are never limited: the page, which asks for the token, and the health checks.
Paths below /page/ are open too."""

CLIENTS = 10_000
"""How many clients' rates are remembered; the client that has been quiet longest is forgotten first."""


class Rate:
    """A token bucket for each client: `rate` requests a second, `burst` at once. `clock` returns seconds."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> float:
        """Take a token for `client` and return 0; if its bucket is empty, return the seconds until there is one."""
        now = self._clock()
        level, updated = self._buckets.pop(client, (float(self._burst), now))
        level = min(self._burst, level + (now - updated) * self._rate)
        allowed = level >= 1
        self._buckets[client] = (level - 1 if allowed else level, now)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - level) / self._rate


class Guard:
    """ASGI middleware that checks token, rate and requests in progress, and counts and times the responses."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Traffic) -> None:
        self._app, self._config, self._metrics = app, config, metrics
        self._rate = Rate(config.rate, config.rate_burst) if config.rate else None
        self._pending = 0
        self._body_bytes, self._most_bytes = 0, parse_bytes(config.body_memory)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._checked(scope, receive, watch)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_PATHS or scope["path"].startswith("/page/"):
            await self._app(scope, receive, send)
            return
        try:
            self._admit(scope)
        except Refused as error:
            await refusal(error)(scope, receive, send)
            return
        self._pending += 1
        self._metrics.pending.set(self._pending)
        held = 0

        async def counted() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            held += size
            self._body_bytes += size
            if size and self._body_bytes > self._most_bytes:
                raise Busy("the bodies of other requests take all memory for them")
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._body_bytes -= held
            self._pending -= 1
            self._metrics.pending.set(self._pending)

    def _admit(self, scope: Scope) -> None:
        """Raise Refused (401) or Busy (429, 503) if the request may not be handled now."""
        if self._config.token and not _has_token(scope, self._config.token):
            raise Refused(401, "this service needs a token: send Authorization: Bearer TOKEN")
        if self._rate is not None and (wait := self._rate.wait((scope.get("client") or ("",))[0])):
            raise Busy(f"more than {self._config.rate:g} requests a second", 429, max(1, round(wait + 0.5)))
        if self._pending >= self._config.max_pending:
            raise Busy(f"{self._pending} requests are in progress")


def _has_token(scope: MutableMapping[str, Any], token: str) -> bool:
    """Whether the request carries the token, in its Authorization header or, without one, in its cookie.

    Clients send characters that are not ASCII in UTF-8 or in Latin-1, and cookies percent-encoded, quoted or as they
    are. Spaces around a header's value are no part of it.
    """
    headers = dict(scope["headers"])
    kind, _, value = headers.get(b"authorization", b"").partition(b" ")
    given = [value.strip()]
    if kind.lower() != b"bearer":
        given = []
        for pair in headers.get(b"cookie", b"").split(b";"):
            name, _, value = pair.strip().partition(b"=")
            if name == COOKIE.encode():
                given += [unquote_to_bytes(value), value, _unquoted(value)]
    text = token.strip()
    expected = [text.encode()]
    with contextlib.suppress(UnicodeEncodeError):
        expected.append(text.encode("latin-1"))
    return any(hmac.compare_digest(one, right) for one in given for right in expected)


def _unquoted(value: bytes) -> bytes:
    """Return a cookie's value without the quotes around it, and the escapes in them (RFC 2109)."""
    if len(value) < 2 or not value.startswith(b'"') or not value.endswith(b'"'):
        return value
    octal = re.sub(rb"\\([0-3][0-7]{2})", lambda escaped: bytes([int(escaped[1], 8)]), value[1:-1])
    return re.sub(rb"\\(.)", rb"\1", octal)
