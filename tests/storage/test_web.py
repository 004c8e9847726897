"""Fetching images from hosts that may be hostile, and addresses that must not be reached."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from clip_batch.storage import web
from clip_batch.storage.web import FetchError, fetch
from tests.servers.image_server import image_server


@pytest.fixture(scope="module")
def images() -> Iterator[str]:
    with image_server() as url:
        yield url


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/loop", "redirects"),
        ("/file", "must begin with http"),
        ("/bad", "cannot be fetched"),
        ("/large", "more than 2000 bytes"),
        ("/absent", "answers 404"),
        ("/slow", "no answer within 0.5 s"),
        ("/a b\r\nX-Injected: 1", "more than 2000 bytes|cannot be fetched|answers|^$"),
    ],
)
def test_hostile_hosts(images: str, path: str, text: str) -> None:
    started = time.monotonic()
    if path.startswith("/a b"):
        assert fetch(images + path, 2000, 5, allow_private=True)  # quoted: one request, no header of its own
        return
    with pytest.raises(FetchError, match=text):
        fetch(images + path, 2000, 0.5 if path == "/slow" else 5, allow_private=True)
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a.example/x",
        "file:///etc/passwd",
        "http://",
        "//a",
        "a",
        "http://user:pw@127.0.0.1/",
        "http://127.0.0.1:99999/",
        "http://[::1]/",
        "http://0x7f.1/",
        "http://2130706433/",
        "http://localhost/",
        "http://a\x00b/",
        "http://" + "a" * 300 + "/",
        "http://xn--/",
        "http://\udcff/",
    ],
)
def test_urls_that_lead_nowhere_or_home(url: str) -> None:
    with pytest.raises(FetchError) as failed:
        fetch(url, 1000, 2)
    assert failed.value.reason in web.REASONS
    assert "\n" not in str(failed.value)


def test_a_redirect_home_is_checked_too(images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def first_only(address: str) -> bool:
        asked.append(address)
        return len(asked) == 1

    monkeypatch.setattr(web, "is_public", first_only)
    with pytest.raises(FetchError, match="not a public address"):
        fetch(f"{images}/moved", 10**6, 5)
    assert len(asked) == 2


@pytest.mark.parametrize(
    "addresses", [["8.8.8.8", "10.0.0.1"], ["2606:4700::1111", "::ffff:10.0.0.1"], ["64:ff9b::a00:1"]]
)
def test_every_address_of_a_name_is_checked(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(0, 0, 0, "", (address, 80)) for address in addresses]
    monkeypatch.setattr(web.socket, "getaddrinfo", lambda *_, **__: entries)
    monkeypatch.setattr(web.socket, "create_connection", lambda *_: pytest.fail("connected"))
    with pytest.raises(FetchError, match="not a public address"):
        fetch("http://a.example/", 1000, 2)


def test_the_checked_address_is_connected_to(images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resolves to another address the second time (DNS rebinding) is resolved once."""
    resolved: list[str] = []
    real = web.socket.getaddrinfo

    def once(host: str, *rest: object, **more: object) -> object:
        if host != "a.example":
            return real(host, *rest, **more)
        resolved.append(host)
        return real("127.0.0.1" if len(resolved) == 1 else "10.0.0.1", *rest, **more)

    monkeypatch.setattr(web.socket, "getaddrinfo", once)
    monkeypatch.setattr(web, "is_public", lambda address: address == "127.0.0.1")
    assert fetch(images.replace("127.0.0.1", "a.example") + "/image", 10**6, 5)
    assert resolved == ["a.example"]
