"""Fetching images by URLs that strangers wrote, without letting them reach this machine's network.

Only http and https are allowed. The addresses of the host are checked, and the connection goes to a checked
address, at each redirect too. No proxy, cookies or credentials are used. One deadline covers everything.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from clip_batch.errors import ClipBatchError, one_line
from clip_batch.storage.addresses import is_public

REDIRECTS = 5
"""Redirects that are followed."""

_SAFE = "/%:@!$&'()*+,;=?~"
"""Characters that are not escaped in a path or a query."""


class FetchError(ClipBatchError):
    """A URL that cannot be fetched: `reason` is one of REASONS, and the message completes "the URL ..."."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


REASONS = ("bad_url", "private_address", "not_found", "http_error", "too_large", "timeout", "unreachable")


def fetch(url: str, limit: int, timeout: float, allow_private: bool = False) -> bytes:
    """Fetch a URL: at most `limit` bytes, within `timeout` seconds. FetchError where that is not possible.

    `allow_private` allows addresses that are not public.
    """
    deadline = time.monotonic() + timeout
    try:
        for _ in range(REDIRECTS + 1):
            response = _get(url, limit, deadline, allow_private)
            if isinstance(response, bytes):
                return response
            url = response
    except (OSError, ValueError, http.client.HTTPException) as error:
        late = time.monotonic() >= deadline or isinstance(error, TimeoutError)
        why = f"no answer within {timeout:g} s" if late else one_line(error, 200)
        reason = "timeout" if late else "bad_url" if isinstance(error, ValueError) else "unreachable"
        raise FetchError(reason, f"cannot be fetched: {why}") from None
    raise FetchError("http_error", f"leads through more than {REDIRECTS} redirects")


def _get(url: str, limit: int, deadline: float, allow_private: bool) -> bytes | str:
    """The body of the response, or the URL that it redirects to."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError("bad_url", "must begin with http:// or https:// and name a host")
    if parts.username is not None or parts.password is not None:
        raise FetchError("bad_url", "must not hold a user or a password")
    connection = http.client.HTTPConnection(parts.hostname, 80)  # with a port, an IPv6 address is not cut for one
    connected = _connect(parts, deadline, allow_private)
    # A socket's own timeout never ends a peer that sends a byte now and then.
    line = connected.dup()  # TLS takes over the first descriptor
    watchdog = threading.Timer(max(0.0, deadline - time.monotonic()), _cut, [line])
    watchdog.daemon = True
    watchdog.start()
    try:
        connection.sock = _secure(connected, parts.hostname) if parts.scheme == "https" else connected
        target = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
        headers = {"Host": parts.netloc, "User-Agent": "clip-batch", "Accept": "image/*", "Connection": "close"}
        connection.request("GET", target, headers=headers)
        with connection.getresponse() as response:
            if response.status in (301, 302, 303, 307, 308) and (location := response.getheader("location")):
                return urljoin(url, location)
            if response.status != 200:
                reason = "not_found" if response.status in (404, 410) else "http_error"
                raise FetchError(reason, f"answers {response.status}")
            body = _body(response, limit)
            if time.monotonic() >= deadline or response.length:
                raise ConnectionError("the answer breaks off")
            return body
    finally:
        watchdog.cancel()
        for open_socket in (connection, connected, line):
            open_socket.close()


def _connect(parts: SplitResult, deadline: float, allow_private: bool) -> socket.socket:
    port = parts.port or (443 if parts.scheme == "https" else 80)
    assert parts.hostname
    entries = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    if not allow_private and not all(map(is_public, addresses)):
        raise FetchError("private_address", f"names {parts.hostname}, which is not a public address")
    last: OSError | None = None
    for address in addresses:
        try:
            return socket.create_connection((address, port), max(0.001, deadline - time.monotonic()))
        except OSError as error:
            last = error
    raise last or OSError("no address")


def _secure(connected: socket.socket, host: str) -> socket.socket:
    return ssl.create_default_context().wrap_socket(connected, server_hostname=host)


def _cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed meanwhile
        connected.shutdown(socket.SHUT_RDWR)


def _body(response: Any, limit: int) -> bytes:
    body = bytearray()
    while piece := response.read(min(65_536, limit + 1 - len(body))):
        body += piece
        if len(body) > limit:
            raise FetchError("too_large", f"holds more than {limit} bytes")
    return bytes(body)
