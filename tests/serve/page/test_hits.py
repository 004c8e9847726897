"""The hits on the page: what each shows, and searches that start from one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clip_batch.client import Client
from tests import parquets
from tests.corpus import encode, picture, write_tar
from tests.servers.serving import index_of, running

pytest.importorskip("playwright")
from playwright.sync_api import Browser, Page, expect

from tests.serve.page.browsing import BROKEN, EVIL, ROWS, SHOWS, hits, in_chromium, row_of, search, shown, text_search

pytestmark = in_chromium


def test_a_hit_finds_similar_ones_and_back_goes_back(page: Page) -> None:
    before = text_search(page)
    hits(page).nth(3).hover()
    request, ids = search(page, hits(page).nth(3).get_by_label("Find similar").click)
    assert (request["id"], ids[0]) == (before[3], before[3])
    assert page.get_by_label("Search text").input_value() == ""
    page.go_back()
    page.wait_for_function(SHOWS, arg=before)
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


def test_tiny_pictures_among_others_leave_all_hits_in_place(browser: Browser, tmp_path: Path) -> None:
    shapes = [(1, 1), (2, 2), (1, 900), (900, 1), *[(64, 48)] * 8]
    files = [(f"{i}.png", encode(picture(i, 64).resize(shape), "PNG")) for i, shape in enumerate(shapes)]
    index = index_of([write_tar(str(tmp_path / "0.tar"), files)], tmp_path)
    with running({"tiny": index}) as url:
        page = browser.new_page(viewport={"width": 1000, "height": 700}, device_scale_factor=2)
        page.goto(url)
        expect(page.locator("#size")).to_have_text("Search 12 images")
        text_search(page, "a picture")
        expect(page.locator(".hit .picture.shown")).to_have_count(len(shapes))
        for card in page.locator(".hit").all():
            box = card.bounding_box()
            assert box and box["width"] > 50 and box["height"] > 50
        for place in range(4):
            page.locator(".hit").nth(place).locator(".picture").click()
            expect(page.locator("#picture img")).to_have_attribute("style", re.compile(r"--ratio: [\d.]+;"))
            page.keyboard.press("Escape")
        page.close()


def test_an_index_of_captions_alone_shows_captions(browser: Browser, tmp_path: Path) -> None:
    captions = [f"a caption number {i}" for i in range(20)]
    index = index_of([parquets.write(str(tmp_path / "a.parquet"), {"caption": captions})], tmp_path)
    with running({"captions": index}) as url:
        page = browser.new_page()
        page.goto(url)
        expect(page.locator("#size")).to_have_text("Search 20 captions")
        expect(page.locator("#modality")).to_be_hidden()
        expect(page.locator("#facts")).to_contain_text("Captions")
        text_search(page, "a caption")
        expect(page.locator(".hit .words").first).to_contain_text("a caption number")
        expect(page.get_by_text("no image")).to_have_count(0)
        page.close()


def test_back_keeps_the_focus_on_the_hit_that_had_it(page: Page) -> None:
    before = text_search(page)
    page.get_by_label("Search text").press("ArrowDown")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    search(page, lambda: page.keyboard.press("s"))
    page.go_back()
    page.wait_for_function(SHOWS, arg=before)
    expect(page.locator(".hit").nth(2).locator(".picture")).to_be_focused()


PLACES = "Object.fromEntries([...document.querySelectorAll('.hit')].map(({dataset}) => [dataset.place, +dataset.id]))"


def test_scrolling_shows_all_rows_once_in_order(page: Page, service: str) -> None:
    text_search(page)
    page.mouse.move(500, 400)
    found: dict[int, int] = {}
    for _ in range(200):
        found |= page.evaluate(PLACES)
        if page.locator("#end").inner_text() and len(found) == ROWS:
            break
        page.mouse.wheel(0, 500)
        page.wait_for_timeout(50)
    expect(page.locator("#end")).to_have_text("These are all.")
    with Client(service) as client:
        wanted = [hit.id for hit in client.search(text="picture number 5", k=ROWS)]
    assert found == {str(place): id for place, id in enumerate(wanted)}
    assert hits(page).count() < ROWS, "cards that are far from the screen do not exist"


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
    box = "[hit.offsetTop, hit.querySelector('.picture').offsetHeight, hit.offsetLeft + hit.offsetWidth]"
    boxes = page.evaluate(f"[...document.querySelectorAll('.hit')].map(hit => {box})")
    width = page.locator("#hits").evaluate("hits => hits.clientWidth")
    tops = sorted({top for top, _, _ in boxes})
    for top in tops[:-1]:  # a row is justified: one height, its own shapes, as wide as the page
        row = [box for box in boxes if box[0] == top]
        assert len({height for _, height, _ in row}) == 1
        assert max(right for _, _, right in row) == pytest.approx(width, abs=2)
    assert len(ids) == 60


def test_data_is_text_and_never_markup(page: Page, index: str) -> None:
    evil = row_of(index, "000003")
    page.goto(f"{page.url}#t=1~id~{evil}~<b>bold</b>")
    page.reload()
    card = page.locator(f".hit[data-id='{evil}']")
    expect(card.locator(".caption")).to_have_text(EVIL)
    expect(card.locator("a")).to_have_count(0)
    expect(page.locator(".chip .name")).to_have_text("<b>bold</b>")
    card.locator(".picture").click()
    expect(page.locator("#viewer-name")).to_have_text(EVIL)
    expect(page.locator("#theirs a")).to_have_count(0)
    expect(page.locator("#theirs")).to_contain_text("javascript:window.hacked=1")


def test_a_broken_picture_has_a_stand_in(page: Page, index: str) -> None:
    broken = row_of(index, BROKEN)
    page.goto(f"{page.url}#t=1~id~{broken}~x")
    page.reload()
    card = page.locator(f".hit[data-id='{broken}']")
    expect(card.locator(".none")).to_have_text("cannot be shown")
    card.hover()
    _, ids = search(page, card.get_by_label("Add to the query").click)
    assert ids[0] == broken
