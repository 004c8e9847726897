"""Images that only have a URL: off, loaded by the browser, or fetched by the service."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import Browser, Page, expect

from tests.corpus import jpeg, write_tar
from tests.serve.page.browsing import in_chromium
from tests.servers.image_server import image_server
from tests.servers.serving import index_of, running

pytestmark = in_chromium

LOADED = "() => [...document.querySelectorAll('.hit img')].some(image => image.naturalWidth > 0)"


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    with image_server() as url:
        yield url


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory, elsewhere: str) -> str:
    """An index of which the pictures cannot be read, but have addresses."""
    folder = tmp_path_factory.mktemp("linked")
    files = []
    for i in range(4):
        files += [(f"{i}.jpg", jpeg(i)), (f"{i}.json", json.dumps({"url": f"{elsewhere}/image?{i}"}).encode())]
    return index_of([write_tar(str(folder / "0.tar.gz"), files, mode="w:gz")], folder)


def visit(browser: Browser, url: str) -> tuple[Page, list[str]]:
    page = browser.new_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    expect(page.locator(".hit")).to_have_count(4)
    return page, requests


def test_off_it_says_how_to_turn_it_on(browser: Browser, linked: str, elsewhere: str) -> None:
    with running({"linked": linked}) as url:
        page, requests = visit(browser, url)
        expect(page.locator("#urls-only")).to_contain_text("--page-images proxy")
        expect(page.locator(".hit .none").first).to_have_text("no image")
        assert [one for one in requests if one.startswith(elsewhere)] == []
        page.close()


def test_direct_the_browser_loads_them(browser: Browser, linked: str, elsewhere: str) -> None:
    with running({"linked": linked}, "--page-images", "direct") as url:
        page, requests = visit(browser, url)
        page.wait_for_function(LOADED)
        assert any(one.startswith(elsewhere) for one in requests)
        expect(page.locator("#urls-only")).to_be_hidden()
        page.close()


def test_proxy_the_service_fetches_them(browser: Browser, linked: str, elsewhere: str) -> None:
    with running({"linked": linked}, "--page-images", "proxy", "--image-url-private") as url:
        page, requests = visit(browser, url)
        page.wait_for_function(LOADED)
        assert [one for one in requests if one.startswith(elsewhere)] == []
        page.close()
