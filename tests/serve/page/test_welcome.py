"""The first screen, what the browser remembers, and searches while one types."""

from __future__ import annotations

import pytest

from clip_batch.client import Client

pytest.importorskip("playwright")
from playwright.sync_api import BrowserContext, Page, Route, expect

from tests.serve.page.browsing import SHOWS, hits, in_chromium, search, text_search

pytestmark = in_chromium


def test_it_shows_what_is_in_the_collection(page: Page) -> None:
    expect(page.locator("#facts")).to_contain_text("150")
    expect(page.locator("#facts")).to_contain_text("fake:8")
    expect(page.locator("#facts")).to_contain_text("caption, ")
    expect(page.locator("#facts")).to_contain_text("Recall@10")
    expect(hits(page).first).to_be_visible()
    assert page.locator(".score").count() == 0
    hits(page).nth(2).locator(".picture").click()
    expect(page.locator("#place")).to_have_text("3 of 48")
    page.keyboard.press("Escape")
    request, ids = search(page, page.locator("#examples button").first.click)
    assert "picture number" in request["text"] and len(ids) == 60


def test_what_is_typed_while_the_page_loads_stays(context: BrowserContext, service: str) -> None:
    page = context.new_page()
    waiting: list[Route] = []
    page.route("**/v1/indices", lambda route: waiting.append(route))
    page.goto(service)
    page.get_by_label("Search text").fill("a shadow")
    while not waiting:
        page.wait_for_timeout(20)
    waiting[0].continue_()
    expect(page.locator("#size")).to_have_text("Search 150 images")
    expect(page.get_by_label("Search text")).to_have_value("a shadow")


def test_counts_are_of_the_index_that_is_searched(page: Page) -> None:
    page.get_by_label("Index").select_option("other")
    expect(page.locator("#size")).to_have_text("Search 9 images")
    expect(page.locator(".hit")).to_have_count(9)


def test_recent_and_kept_searches_stay_in_this_browser(page: Page) -> None:
    text_search(page, "a first one")
    page.get_by_role("button", name="Keep this search").click()
    expect(page.get_by_role("button", name="Forget this search")).to_be_visible()
    text_search(page, "a second one")
    page.reload()
    page.get_by_label("Search text").press("Escape")
    kept, recent = page.locator("#kept"), page.locator("#recent")
    expect(kept.locator(".pill")).to_have_text(["“a first one”"])
    expect(recent.locator(".pill")).to_have_text(["“a second one”", "“a first one”"])
    request, _ = search(page, kept.locator(".pill").click)
    assert request["text"] == "a first one"
    page.get_by_label("Search text").press("Escape")
    kept.get_by_label("Forget “a first one”").click()
    expect(kept).to_be_hidden()
    recent.get_by_role("button", name="Forget all").click()
    expect(recent).to_be_hidden()


def test_it_searches_while_one_types_and_back_forgets_the_letters(context: BrowserContext, service: str) -> None:
    context.add_init_script("localStorage.setItem('typing', 'on')")
    page = context.new_page()
    page.goto(service)
    expect(page.locator("#size")).to_have_text("Search 150 images")
    page.evaluate("performance.now = () => 0")  # every search is quick, however busy this machine is
    text_search(page, "picture number 5")
    with Client(service) as client:
        wanted = [hit.id for hit in client.search(text="picture number 77, with a comma", k=60)]
    page.get_by_label("Search text").fill("")
    page.get_by_label("Search text").press_sequentially("picture number 77, with a comma", delay=20)
    page.wait_for_function(SHOWS, arg=wanted)
    expect(page.get_by_role("status")).to_contain_text("number 77")
    page.go_back()
    expect(page.get_by_label("Search text")).to_have_value("picture number 5")
