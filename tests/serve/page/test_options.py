"""The options, addresses, downloads and keys of the page."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from clip_batch.client import Client

pytest.importorskip("playwright")
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.serve.page.browsing import (
    EVIL,
    SHOWS,
    hits,
    in_chromium,
    member,
    row_of,
    search,
    shown,
    text_search,
    type_text,
)

pytestmark = in_chromium


def test_toggles_of_what_is_on(page: Page, service: str) -> None:
    all_rows = text_search(page, "picture")
    for name, flag in {"Unique": "deduplicate", "Safe": "safety", "No violence": "violence"}.items():
        request, ids = search(page, page.get_by_text(name, exact=True).click)
        assert request[flag] is True
        with Client(service) as client:
            assert [hit.id for hit in client.search(text="picture", k=60, **{flag: True})] == ids
        search(page, page.get_by_text(name, exact=True).click)
    slider = page.get_by_label("Aesthetic")
    request, ids = search(page, lambda: slider.fill("0.5"))
    assert request["aesthetic"] == 0.5
    assert ids != all_rows


def test_a_new_version_of_the_index_is_searched_from_the_start(page: Page) -> None:
    swapped = []

    def answer(route: Any) -> None:
        content = route.fetch().json()
        if '"k":120' in route.request.post_data and not swapped:
            swapped.append(content)
            content |= {"version": "another", "hits": content["hits"][::-1]}
        route.fulfill(json=content)

    page.route("**/v1/search", answer)
    wanted = text_search(page)
    page.mouse.move(500, 400)
    for _ in range(100):
        page.mouse.wheel(0, 2000)
        page.wait_for_timeout(50)
        if swapped:
            break
    assert len(swapped) == 1
    page.wait_for_function(SHOWS, arg=wanted)


def test_what_is_off_is_not_shown(context: BrowserContext, guarded: str) -> None:
    page = context.new_page()
    page.goto(guarded)
    page.locator("#token").fill("open-sesame")
    page.locator("#token").press("Enter")
    expect(page.locator("#size")).to_have_text("Search 150 images")
    for name in ("Safe", "No violence", "Aesthetic"):
        expect(page.get_by_text(name, exact=True)).to_be_hidden()
    expect(page.get_by_label("Index")).to_be_hidden()
    expect(page.get_by_text("Unique", exact=True)).to_be_visible()


def test_captions_instead_of_images(page: Page, service: str) -> None:
    text_search(page, "picture number 8, with a comma")
    request, _ = search(page, page.get_by_text("Captions", exact=True).click)
    assert request["modality"] == "text"
    expect(hits(page).first.locator(".caption")).to_have_text("picture number 8, with a comma")


def test_another_index(page: Page) -> None:
    text_search(page)
    hits(page).nth(3).hover()
    search(page, hits(page).nth(3).get_by_label("Find similar").click)
    page.get_by_label("Index").select_option("other")
    expect(page.locator(".chip")).to_have_count(0)  # it was a row of the other index
    request, ids = search(page, lambda: type_text(page, "caption"))
    assert (request["index"], len(ids)) == ("other", 9)


def test_an_address_says_it_all(page: Page, browser: Browser, service: str, index: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jpg").write_bytes(member(index, 12))
    search(page, lambda: page.set_input_files("#file", tmp_path / "mine.jpg"))
    page.get_by_label("Search text").fill("100% ~ of & # +")
    search(page, page.get_by_label("Subtract the text from the query").click)
    search(page, page.get_by_text("Unique", exact=True).click)
    search(page, page.get_by_text("Captions", exact=True).click)
    request, ids = search(page, lambda: type_text(page, "more"))
    fresh = browser.new_context()
    again = fresh.new_page()
    again_request, again_ids = search(again, lambda: again.goto(page.url))
    assert (again_request, again_ids) == (request, ids)
    expect(again.locator(".chip")).to_have_count(2)
    assert again.get_by_label("Search text").input_value() == "more"
    assert request["queries"][1]["text"] == "100% ~ of & # +"
    fresh.close()


@pytest.mark.parametrize(
    "address",
    [
        "t=",
        "t=1~id~-3~x",
        "t=1~id~x~x",
        "t=x~text~a~b",
        "t=1~nonsense~a~b",
        "t=1~embedding~!!~x",
        "t=999~text~a~b",
        "%E0%A4%A",
    ],
)
def test_an_address_without_sense_is_a_page_without_search(page: Page, address: str) -> None:
    page.goto(f"{page.url}#{address}")
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator(".chip")).to_have_count(0)


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_downloads_hold_the_hits_of_the_page(page: Page, index: str, service: str, kind: str) -> None:
    evil = row_of(index, "000003")
    search(page, lambda: page.evaluate("address => { location.hash = address }", f"t=1~id~{evil}~a+row"))
    with page.expect_download() as caught:
        page.get_by_label("Download the hits").select_option(kind)
    path = caught.value.path()
    assert caught.value.suggested_filename == f"hits-images-like-a-row.{kind}"
    if kind == "json":
        saved_hits = json.loads(path.read_text())["hits"]
        rows = [{**hit["metadata"], "id": hit["id"], "score": hit["score"]} for hit in saved_hits]
    elif kind == "csv":
        rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline="")))
    else:
        rows = pq.read_table(path).to_pylist()
    assert len(rows) >= 60
    with Client(service) as client:
        wanted = client.search(id=evil, k=len(rows))
    assert rows[0]["caption"] == EVIL
    for row, hit in zip(rows, wanted, strict=True):
        assert (int(row["id"]), float(row["score"])) == (hit.id, pytest.approx(hit.score, abs=1e-6))
        assert (row["caption"], row["url"]) == (hit.metadata["caption"], hit.metadata["url"])
        assert int(row["number"]) == hit.metadata["number"]
        if kind != "json":
            assert (row["metadata.id"], int(row["metadata.score"])) == (hit.metadata["id"], 7)
    if kind == "csv":
        assert {row["colour"] for row in rows} == {"red", "green", "blue", "'=1+1"}, (
            "nothing that runs in a spreadsheet"
        )


def test_it_is_used_without_a_mouse(page: Page) -> None:
    text_search(page)
    page.keyboard.press("ArrowDown")
    focused = "document.activeElement.closest('.hit')?.dataset.id"
    ids = shown(page)
    assert page.evaluate(focused) == str(ids[0])
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == str(ids[2])
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == str(ids[1])
    page.keyboard.press("ArrowDown")
    below = ids.index(int(page.evaluate(focused)))
    tops = page.evaluate("[...document.querySelectorAll('.hit')].map(hit => hit.offsetTop)")
    assert tops[below] > tops[1]
    assert len({top for top in tops if tops[1] < top <= tops[below]}) == 1
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Home")
    assert page.evaluate(focused) == str(ids[0])
    page.keyboard.press("ArrowRight")
    request, _ = search(page, lambda: page.keyboard.press("-"))
    assert request["queries"][0] == {"id": ids[1], "weight": -0.5}
    page.get_by_label("Search text").focus()
    page.keyboard.press("ArrowDown")
    wanted = shown(page)[0]
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert page.evaluate(focused) == str(wanted)
    request, _ = search(page, lambda: page.keyboard.press("s"))
    assert request["id"] == wanted
    page.keyboard.press("Tab")
    page.locator("#hits .picture").first.focus()
    page.keyboard.press("/")
    expect(page.get_by_label("Search text")).to_be_focused()
    stops = page.evaluate(
        "[...document.querySelectorAll('#hits button, #hits a')].filter(part => part.tabIndex == 0).length"
    )
    assert stops <= 5
