"""The viewer of one hit, and going through many of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from clip_batch.client import Client

pytest.importorskip("playwright")
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.serve.page.browsing import hits, in_chromium, search, text_search

pytestmark = in_chromium

FOCUSED = "document.activeElement.closest('.hit')?.dataset.id"


def facts(page: Page, place: str) -> dict[str, str]:
    """The names and values of a list in the viewer."""
    pairs: list[list[str]] = page.evaluate(
        """place => [...document.querySelectorAll(`#${place} dt`)]
            .map(name => [name.innerText, name.nextSibling.innerText])""",
        place,
    )
    return dict(pairs)


def test_it_tells_all_and_what_is_ours_apart_from_what_is_theirs(page: Page, service: str) -> None:
    text_search(page)
    with Client(service) as client:
        hit = client.search(text="picture number 5", k=3)[2]
    hits(page).nth(2).locator(".picture").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert facts(page, "ours") == {"Id": str(hit.id), "Score": f"{hit.score:.4f}"}
    theirs = facts(page, "theirs")
    assert (theirs["id"], theirs["score"]) == (hit.metadata["id"], "7")
    assert theirs["row"] == str(hit.metadata["row"])
    assert set(theirs) == {name for name, value in hit.metadata.items() if value is not None}
    expect(page.locator("#theirs a")).to_have_attribute("href", hit.metadata["url"])
    page.wait_for_function("() => document.querySelector('#picture img').naturalWidth > 0")


def test_keys_go_through_the_hits_and_back_closes_it_where_one_was(page: Page) -> None:
    ids = text_search(page)
    page.mouse.move(500, 400)
    page.mouse.wheel(0, 400)
    page.wait_for_function("() => scrollY > 300")
    place = int(page.locator(".hit").nth(5).get_attribute("data-place") or "")
    page.locator(f".hit[data-place='{place}'] .picture").click()
    for step in (1, 2):
        page.keyboard.press("ArrowRight")
        expect(page.locator("#place")).to_have_text(f"{place + 1 + step} of 60")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#place")).to_have_text(f"{place + 2} of 60")
    assert f"view={ids[place + 1]}" in page.url
    before = page.evaluate("scrollY")
    page.go_back()
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert page.evaluate(FOCUSED) == str(ids[place + 1])
    assert abs(page.evaluate("scrollY") - before) < 5
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_back_restores_the_place_on_the_page_and_so_does_loading_it_anew(page: Page) -> None:
    text_search(page)
    page.mouse.move(500, 400)
    for _ in range(200):
        page.mouse.wheel(0, 500)
        page.wait_for_timeout(30)
        if int(hits(page).first.get_attribute("data-place") or "") > 70:
            break
    top = "document.elementFromPoint(300, 400).closest('.hit')?.dataset.id"
    page.wait_for_function(f"() => {top}")
    card = page.locator(f".hit[data-id='{page.evaluate(top)}']")
    search(page, card.get_by_label("Find similar").click)
    assert page.evaluate("scrollY") == 0
    page.go_back()
    expect(card).to_be_in_viewport()
    page.reload()
    expect(card).to_be_in_viewport()


def test_a_link_opens_it_and_the_backdrop_closes_it(page: Page, browser: Browser, service: str) -> None:
    text_search(page)
    hits(page).nth(1).locator(".picture").click()
    name = page.locator("#viewer-name").inner_text()
    fresh = browser.new_context()
    other = fresh.new_page()
    other.goto(page.url)
    expect(other.locator("#viewer-name")).to_have_text(name)
    other.mouse.click(5, 300)
    expect(other.get_by_role("dialog")).to_have_count(0)
    assert "view=" not in other.url
    other.goto(f"{service}/#view=140")
    expect(other.get_by_role("dialog")).to_be_visible()
    assert facts(other, "ours")["Id"] == "140"
    fresh.close()


def test_similar_plus_minus_and_the_link(page: Page, context: BrowserContext, service: str) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=service)
    ids = text_search(page)
    hits(page).nth(1).locator(".picture").click()
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("#copy-text")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == page.url
    request, _ = search(page, page.get_by_role("button", name="Subtract", exact=True).click)
    assert request["queries"][0] == {"id": ids[1], "weight": -0.5}
    expect(page.get_by_role("dialog")).to_have_count(0)
    hits(page).nth(0).locator(".picture").click()
    request, _ = search(page, page.get_by_role("button", name="Similar", exact=True).click)
    assert "id" in request


def test_zoom_and_swipe(page: Page) -> None:
    text_search(page)
    hits(page).first.locator(".picture").click()
    page.wait_for_function("() => document.querySelector('#picture img').naturalWidth > 0")
    box = page.locator("#picture img").bounding_box()
    assert box
    page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.locator("#stage")).to_have_class("zoomed")
    page.keyboard.press("0")
    expect(page.locator("#stage")).not_to_have_class("zoomed")
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.wheel(0, -400)
    expect(page.locator("#stage")).to_have_class("zoomed")
    swipe = """from => {
        const stage = document.getElementById("stage");
        stage.setPointerCapture = () => {};
        const tell = (kind, x) => stage.dispatchEvent(new PointerEvent(kind, {pointerId: 7, pointerType: "touch",
            clientX: x, clientY: 200, bubbles: true, button: kind == "pointermove" ? -1 : 0}));
        tell("pointerdown", from); tell("pointermove", from - 50); tell("pointerup", from - 120);
    }"""
    page.evaluate(swipe, 300)
    expect(page.locator("#place")).to_have_text("1 of 60")  # it moved the zoomed picture
    page.keyboard.press("0")
    page.evaluate(swipe, 300)
    expect(page.locator("#place")).to_have_text("2 of 60")


def test_thirty_thousand_hits_have_cards_only_near_the_screen(page: Page) -> None:
    def many(route: Any) -> None:
        k = json.loads(route.request.post_data)["k"]
        metadata = [{"caption": f"number {i}", "width": 3 + i % 5, "height": 3} for i in range(k)]
        found = [{"id": i, "score": 1 - i / 40_000, "image": None, "metadata": metadata[i]} for i in range(k)]
        route.fulfill(json={"index": "pictures", "version": "x", "scanned": k, "complete": True, "hits": found})

    page.route("**/v1/indices", lambda route: route.fulfill(json=route.fetch().json() | {"max_k": 30_000}))
    page.route("**/v1/search", many)
    page.reload()
    expect(page.locator("#size")).to_have_text("Search 150 images")
    text_search(page)
    page.keyboard.press("ArrowDown")
    for _ in range(30):
        page.keyboard.press("End")
        page.wait_for_timeout(50)
        if page.evaluate(FOCUSED) == "29999":
            break
    assert page.evaluate(FOCUSED) == "29999"
    assert page.locator(".hit[data-place='29999'] .caption").inner_text() == "number 29999"
    assert hits(page).count() < 200
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight / 2)")
    middle = "hit => Math.abs(hit.dataset.place - 15000) < 200"
    page.wait_for_function(f"() => [...document.querySelectorAll('.hit')].some({middle})")
    assert hits(page).count() < 200
