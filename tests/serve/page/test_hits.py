"""The hits on the page: what each shows, and searches that start from one."""

from __future__ import annotations

import re

import pytest

from clip_batch.client import Client

pytest.importorskip("playwright")
from playwright.sync_api import Page, expect

from tests.serve.page.browsing import BROKEN, EVIL, ROWS, hits, in_chromium, row_of, search, shown, text_search

pytestmark = in_chromium


def test_a_click_finds_similar_ones_and_back_goes_back(page: Page) -> None:
    before = text_search(page)
    request, ids = search(page, hits(page).nth(3).locator(".picture").click)
    assert (request["id"], ids[0]) == (before[3], before[3])
    assert page.get_by_label("Search text").input_value() == ""
    _, again = search(page, page.go_back)
    assert again == before
    assert page.get_by_label("Search text").input_value() == "picture number 5"


def test_hits_and_words_are_added_and_taken_away(page: Page, service: str) -> None:
    first = text_search(page)
    hits(page).nth(1).hover()
    search(page, hits(page).nth(1).get_by_label("Add to the query").click)
    third = shown(page)[2]
    hits(page).nth(2).hover()
    request, ids = search(page, hits(page).nth(2).get_by_label("Subtract from the query").click)
    terms = [{"id": first[1], "weight": 1}, {"id": third, "weight": -0.5}, {"text": "picture number 5", "weight": 1}]
    assert request["queries"] == terms
    with Client(service) as client:
        assert [hit.id for hit in client.search(queries=terms, k=60)] == ids

    page.get_by_label("Search text").fill("a shadow")
    request, _ = search(page, page.get_by_label("Subtract the text from the query").click)
    assert request["queries"][2] == {"text": "a shadow", "weight": -0.5}
    assert page.get_by_label("Search text").input_value() == ""
    expect(page.locator(".chip")).to_have_count(3)
    expect(page.locator(".chip.less")).to_have_count(2)

    weight = page.locator(".chip").nth(0).get_by_role("spinbutton")
    weight.fill("0.25")
    request, _ = search(page, lambda: weight.press("Tab"))
    assert request["queries"][0] == {"id": first[1], "weight": 0.25}
    request, _ = search(page, page.locator(".chip").nth(1).get_by_role("button").click)
    assert [term.get("id") for term in request["queries"]] == [first[1], None]
    request, _ = search(page, lambda: page.get_by_label("Search text").press("Backspace"))
    assert len(request["queries"]) == 1
    page.get_by_label("Search text").press("Escape")
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator(".chip")).to_have_count(0)


def test_scrolling_shows_all_rows_once_in_order(page: Page, service: str) -> None:
    text_search(page)
    for _ in range(100):
        page.mouse.wheel(0, 3000)
        if page.locator("#end").inner_text():
            break
        page.wait_for_timeout(50)
    expect(page.locator("#end")).to_have_text("These are all.")
    with Client(service) as client:
        assert shown(page) == [hit.id for hit in client.search(text="picture number 5", k=ROWS)]


def test_captions_scores_links_and_shapes(page: Page, index: str, service: str) -> None:
    ids = text_search(page)
    with Client(service) as client:
        best = client.search(text="picture number 5", k=1)[0]
    card = hits(page).first
    expect(card.locator(".caption")).to_have_text(best.metadata["caption"])
    expect(card.locator(".score")).to_have_text(f"{best.score:.3f}")
    link = card.locator("a")
    assert link.get_attribute("href") == best.metadata["url"]
    assert link.get_attribute("rel") == "noopener noreferrer"
    height = "[hit.offsetTop, hit.querySelector('.picture').offsetHeight]"
    heights = page.evaluate(f"[...document.querySelectorAll('.hit')].slice(0, 24).map(hit => {height})")
    for top in {top for top, _ in heights}:  # a row is justified: one height, its own shapes
        assert len({height for one, height in heights if one == top}) == 1
    assert len(ids) == 60


def test_data_is_text_and_never_markup(page: Page, index: str) -> None:
    evil = row_of(index, "000003")
    page.goto(f"{page.url}#t=1~id~{evil}~<b>bold</b>")
    page.reload()
    card = page.locator(f".hit[data-id='{evil}']")
    expect(card.locator(".caption")).to_have_text(EVIL)
    expect(card.locator("a")).to_have_count(0)
    expect(page.locator(".chip .name")).to_have_text("<b>bold</b>")
    card.hover()
    card.get_by_label("Details").click()
    expect(page.locator("#detail-name")).to_have_text(EVIL)
    expect(page.locator("#detail-fields a")).to_have_count(0)
    expect(page.locator("#detail-fields")).to_contain_text("javascript:window.hacked=1")


def test_details_are_shown_and_closed(page: Page) -> None:
    text_search(page)
    hits(page).nth(2).hover()
    hits(page).nth(2).get_by_label("Details").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("number")
    expect(dialog.get_by_role("link")).to_have_attribute("href", re.compile("https://example.org/"))
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)


def test_a_broken_picture_has_a_stand_in(page: Page, index: str) -> None:
    broken = row_of(index, BROKEN)
    page.goto(f"{page.url}#t=1~id~{broken}~x")
    page.reload()
    card = page.locator(f".hit[data-id='{broken}']")
    expect(card.locator(".none")).to_have_text("cannot be shown")
    _, ids = search(page, card.locator(".picture").click)
    assert ids[0] == broken
