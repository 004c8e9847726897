"""A service without a token answers only those who name it as it is called, so that no website can rebind its name."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI

from clip_batch.config import ServeConfig
from clip_batch.errors import ConfigError
from clip_batch.serve.http.hosts import HostCheck
from tests.servers.serving import make_index, running


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_index(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def url(index: str) -> Iterator[str]:
    with running({"index": index}, "--allowed-hosts", "search.example.org") as url:
        yield url


def ask(url: str, lines: str) -> tuple[int, str]:
    """Return status and body of the answer to a request that is sent as it is written."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname or "", address.port or 0), 10) as connection:
        connection.sendall(f"{lines}\r\nConnection: close\r\n\r\n".replace("\n", "\r\n").replace("\r\r", "\r").encode())
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status, response.read().decode(errors="replace")


OURS = """localhost LOCALHOST:80 localhost.:1234 a.localhost 127.0.0.1 127.0.0.1:1234 127.9.9.9 [::1] [::1]:1234
[::ffff:127.0.0.1] search.example.org Search.Example.Org.:443"""
THEIRS = """evil.example evil.example:1234 evil localhost.evil.example 127.0.0.1.evil.example evil.example#localhost
localhost@evil.example evil.example/localhost 10.0.0.1 [fe80::1%25eth0] [::2] example.org a.search.example.org 0 0x7f.1
localhost:1234:80 localhost:x [::1 ::1 .localhost.. 0.0.0.0 169.254.169.254 localhost,evil.example"""


def test_the_name_that_a_request_gives(url: str) -> None:
    for path in ("/", "/readyz", "/v1/indices", "/v1/image/index/0", "/page/page.js", "/openapi.json"):
        for host in OURS.split():
            assert ask(url, f"GET {path} HTTP/1.1\nHost: {host}")[0] == 200, host
        for host in THEIRS.split():
            status, body = ask(url, f"GET {path} HTTP/1.1\nHost: {host}")
            assert status == 400, (host, body)
        assert "--allowed-hosts" in ask(url, f"GET {path} HTTP/1.1\nHost: evil.example")[1]


def test_other_ways_to_name_a_host(url: str) -> None:
    port = urlsplit(url).port
    for lines, status in [
        (f"GET http://localhost:{port}/v1/indices HTTP/1.1\nHost: localhost", 200),
        ("GET http://evil.example/v1/indices HTTP/1.1\nHost: localhost", 400),
        ("GET http://localhost/v1/indices HTTP/1.1\nHost: evil.example", 400),
        ("GET /v1/indices HTTP/1.1\nHost: localhost\nHost: evil.example", 400),
        ("GET /v1/indices HTTP/1.1\nHost: evil.example\nX-Forwarded-Host: localhost", 400),
        ("GET /v1/indices HTTP/1.1\nHost:", 400),
        ("GET /v1/indices HTTP/1.1\nA: b", 400),
        ("GET /v1/indices HTTP/1.0", 200),  # no browser
        ("OPTIONS /v1/indices HTTP/1.1\nHost: evil.example\nOrigin: http://evil.example", 400),
    ]:
        assert ask(url, lines)[0] == status, lines


@pytest.mark.parametrize("local", ["10.0.0.5", "fd00::5", "::ffff:10.0.0.5"])
def test_a_connection_from_another_machine(local: str) -> None:
    check = HostCheck(FastAPI(), ["search.example.org"])
    own = [
        "10.0.0.5",
        "[fd00::5]",
        "node7",
        "node7.",
        "search",
        "localhost",
        "a.b.svc.cluster.local",
        "photos.internal",
    ]
    for host in [*own, socket.gethostname(), "search.example.org"]:
        assert check._is_ours(host, (local, 1234)), host
    for host in ("evil.example", "node7.evil.example", "local", "evil.local.example", "10.1", "0x7f000001", ""):
        assert check._is_ours(host, (local, 1234)) == (host == "local"), host
    assert not check._is_ours("node7", ("::ffff:127.0.0.1", 1234))


@pytest.mark.slow
def test_a_token_or_a_star_needs_no_names(index: str, tmp_path: Path) -> None:
    with running({"index": index}, token="secret") as url:
        for path, status in (("/readyz", 200), ("/v1/indices", 401)):
            assert ask(url, f"GET {path} HTTP/1.1\nHost: any.example")[0] == status
    with running({"index": index}, "--allowed-hosts", "*") as url:
        assert ask(url, "GET /v1/indices HTTP/1.1\nHost: any.example")[0] == 200
    for wrong in ("http://a.example", "a.example/x", "a b", ""):
        with pytest.raises(ConfigError, match="a host's name"):
            ServeConfig(allowed_hosts=[wrong])
