"""The page on a collection of photographs: what it loads, how it lies on the screen, and who can use it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest

pytest.importorskip("playwright")
pytest.importorskip("axe_playwright_python")
from playwright.sync_api import Browser, Page, expect

from tests.serve.page.browsing import Watched, in_chromium, type_text
from tests.serve.page.photographs import COUNT, photographs
from tests.servers.serving import index_of, running

pytestmark = in_chromium

MOST = 2_000_000
"""Bytes of a first screen."""


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory, index: str) -> Iterator[str]:
    """The URL of a service of photographs, and of the small pictures of the other tests."""
    folder = tmp_path_factory.mktemp("photographs")
    with running({"photographs": index_of([photographs(folder)], folder), "pictures": index}) as url:
        yield url


def search(page: Page, text: str) -> None:
    type_text(page, text)
    expect(page.get_by_role("status")).to_contain_text(f"hits for “{text}”")
    wait_for_pictures(page)


def wait_for_pictures(page: Page) -> None:
    page.wait_for_function("""() => {
        const onScreen = hit => hit.getBoundingClientRect().top < innerHeight;
        const near = [...document.querySelectorAll(".hit")].filter(onScreen);
        return near.length && near.every(hit => hit.querySelector(".picture.shown"));
    }""")


@pytest.mark.parametrize("density", [1, 2])
def test_a_first_screen_of_photographs_is_small(browser: Browser, collection: str, density: int) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, device_scale_factor=density)
    page = context.new_page()
    sizes: list[int] = []
    page.on("response", lambda answer: sizes.append(int(answer.headers.get("content-length", 0))))
    page.goto(f"{collection}/#q=a cup of coffee")
    expect(page.get_by_role("status")).to_contain_text("60 hits")
    wait_for_pictures(page)
    page.wait_for_load_state("networkidle")
    assert len(sizes) > 20
    assert sum(sizes) < MOST
    context.close()


@pytest.mark.parametrize("width", [360, 820, 1440])
def test_every_shape_is_legible_and_no_button_leaves_its_card(browser: Browser, collection: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    page.goto(collection)
    search(page, "the moon")
    boxes: list[list[float]] = page.evaluate("""() => [...document.querySelectorAll(".hit")].map(hit => {
        const card = hit.getBoundingClientRect(), acts = hit.querySelector(".acts").getBoundingClientRect();
        const picture = hit.querySelector(".picture").getBoundingClientRect();
        return [picture.width, picture.height, acts.left - card.left, card.right - acts.right, card.right - innerWidth];
    })""")
    for wide, high, left, right, beyond in boxes:
        assert wide >= 44 and high >= 60
        assert left >= 0 and right >= 0 and beyond <= 0
    context.close()


AXE = """axe.run({resultTypes: ["violations"]}).then(({passes, violations}) =>
    [passes.length, violations.map(({id, nodes}) => [id, nodes.map(node => node.html)])])"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["photographs", "pictures"])
def test_axe_finds_nothing(browser: Browser, collection: str, watched: Watched, name: str, scheme: Any) -> None:
    axe = (files("axe_playwright_python") / "axe.min.js").read_text()
    context = browser.new_context(color_scheme=scheme, reduced_motion="reduce", viewport={"width": 1280, "height": 800})
    page = context.new_page()

    def check(state: str) -> None:
        page.evaluate(f"{axe};0")
        passed, violations = page.evaluate(AXE)
        assert passed > 10
        assert violations == [], state

    page.goto(f"{collection}/#index={name}")
    expect(page.locator("#facts")).to_be_visible()
    wait_for_pictures(page)
    check("the first screen")
    page.get_by_role("button", name="Filters").click()
    check("the filters")
    search(page, "a motorcycle")
    page.locator("#subtract").click()
    check("hits")
    page.locator(".hit .picture").nth(1).click()
    expect(page.get_by_role("dialog")).to_be_visible()
    check("the viewer")
    page.goto(f"{collection}/#index={name}&q=x&score=1")
    expect(page.locator("#nothing")).to_be_visible()
    check("nothing found")
    context.close()


def test_the_collection_is_whole(collection: str, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(collection)
    expect(page.locator("#size")).to_have_text(f"Search {COUNT} images")
    page.close()
