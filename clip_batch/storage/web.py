"""Fetch an image by a URL that others wrote, without letting it reach into this machine's network.

http and https only. The addresses that a name stands for are checked, and the one that was checked is the
one that is connected to; so at each redirect. No proxy, no cookies, no credentials. One deadline for all.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from clip_batch.errors import ClipBatchError, one_line

REDIRECTS = 5

_SAFE = "/%:@!$&'()*+,;=?~"
"""What a path or a query keeps as it is."""

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class FetchError(ClipBatchError):
    """A URL that gives no image; `reason` is one of REASONS, the message a predicate of the URL."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


REASONS = ("bad_url", "private_address", "not_found", "http_error", "too_large", "timeout", "unreachable")


def public(address: str) -> bool:
    """Whether an IP address is one of the internet, in whatever notation a private one is wrapped."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        wrapped = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if wrapped is None and found in _NAT64:
            wrapped = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if wrapped is not None:
            return public(str(wrapped))
        if found.is_site_local:
            return False
    return found.is_global and not found.is_multicast


def fetch(url: str, limit: int, timeout: float, private: bool = False) -> bytes:
    """What lies at a URL, up to `limit` bytes, within `timeout` seconds. FetchError otherwise.

    `private` allows addresses that are not public.
    """
    deadline = time.monotonic() + timeout
    try:
        for _ in range(REDIRECTS + 1):
            found = _once(url, limit, deadline, private)
            if isinstance(found, bytes):
                return found
            url = found
    except (OSError, ValueError, http.client.HTTPException) as error:
        late = time.monotonic() >= deadline or isinstance(error, TimeoutError)
        said = f"no answer within {timeout:g} s" if late else one_line(error, 200)
        reason = "timeout" if late else "bad_url" if isinstance(error, ValueError) else "unreachable"
        raise FetchError(reason, f"cannot be fetched: {said or type(error).__name__}") from None
    raise FetchError("http_error", f"leads through more than {REDIRECTS} redirects")


def _once(url: str, limit: int, deadline: float, private: bool) -> bytes | str:
    """The body, or where it redirects to."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError("bad_url", "must begin with http:// or https:// and name a host")
    if parts.username is not None or parts.password is not None:
        raise FetchError("bad_url", "must not hold a user or a password")
    connection = http.client.HTTPConnection(parts.hostname)
    connected = _connect(parts, deadline, private)
    # A peer that sends a byte now and then keeps a socket's own timeout from ever ending it.
    line = connected.dup()  # TLS takes the first one over
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


def _connect(parts: SplitResult, deadline: float, private: bool) -> socket.socket:
    port = parts.port or (443 if parts.scheme == "https" else 80)
    assert parts.hostname
    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not private and not all(map(public, addresses)):
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
    with contextlib.suppress(OSError):  # it has ended meanwhile
        connected.shutdown(socket.SHUT_RDWR)


def _body(response: Any, limit: int) -> bytes:
    body = bytearray()
    while piece := response.read(min(65_536, limit + 1 - len(body))):
        body += piece
        if len(body) > limit:
            raise FetchError("too_large", f"holds more than {limit} bytes")
    return bytes(body)
