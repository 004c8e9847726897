"""Refuses requests to a service without a token that name a host which is not the service's.

A website can make its own name resolve to this machine (DNS rebinding). A browser then takes the service for a part of
that website, whose scripts may read all answers; but it still sends the website's name as Host.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clip_batch.serve.http.errors import Refused
from clip_batch.serve.http.responses import refusal

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

    from clip_batch.config import ServeConfig

ANY = "*"
"""The entry of `allowed_hosts` that turns the check off."""

PRIVATE = ("localhost", "local", "internal", "home.arpa")
"""Top-level names that no website can have (RFC 6761, 6762, 8375, and ICANN's resolution 2024.07.29.06)."""

_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+(?:%[\w.\-~%]+)?)\]|(?P<name>[\w.\-]+))(?::\d{0,5})?", re.ASCII)


def check_hosts(app: FastAPI, config: ServeConfig) -> None:
    """Add the check to a service, outermost, where it has no token or `allowed_hosts` are given."""
    if config.allowed_hosts or not config.token:
        app.add_middleware(HostCheck, names=[*config.allowed_hosts, config.host])


class HostCheck:
    """ASGI middleware that answers 400 where a request's host is not a name of this service.

    A connection to a loopback address must name `localhost`, a name below it, or a loopback address. Any other
    connection may also name an address, a name without dots, a private name (`PRIVATE`) or this machine's own name.
    `names` are allowed everywhere. Requests without a host come from no browser, and pass.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self._app, self._any = app, ANY in names
        self._names = {_plain(name) for name in names}
        self._own = {_plain(name) for name in (socket.gethostname(), socket.getfqdn())}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._any:
            try:
                self._check(scope)
            except Refused as error:
                await refusal(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raise Refused (400) unless the Host header, and the request's target if it is a URL, name this service."""
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        path = scope["path"]
        if not path.startswith("/") and "://" in path:  # a URL, which RFC 9112 says goes before Host
            host, slash, rest = path.partition("://")[2].partition("/")
            hosts.append(host)
            scope["path"] = slash + rest or "/"
        for host in hosts:
            if not self._is_ours(host, scope.get("server")):
                raise Refused(
                    400,
                    f"{host!r:.200} is not a name of this service, which has no token: add it to --allowed-hosts, or "
                    "set CLIP_BATCH_TOKEN",
                )

    def _is_ours(self, host: str, server: Any) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = _plain(match["ipv6"] or match["name"])
        if name in self._names or name == "localhost" or name.endswith(".localhost"):
            return True
        address, connected = _address(name), _address(str(server[0])) if server else None
        if connected is not None and connected.is_loopback:
            return address is not None and address.is_loopback
        last = name.rpartition(".")[2]
        private = "." not in name or any(name.endswith("." + suffix) for suffix in PRIVATE)
        return address is not None or name in self._own or (private and not last[:1].isdigit())


def _plain(name: str) -> str:
    """Return a host's name in lower case, without the dot that may end it, or the brackets around an address."""
    return name.strip("[]").partition("%")[0].lower().removesuffix(".")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a host is, without an IPv6 address around an IPv4 one; None for a name."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
