"""The panel of filters: made from what is in the index, combined with any query, in the link."""

from __future__ import annotations

from typing import Any

import pytest

from clip_batch.client import Client

pytest.importorskip("playwright")
from playwright.sync_api import Browser, Page, expect

from tests.serve.page.browsing import ROWS, hits, in_chromium, search, text_search

pytestmark = in_chromium


@pytest.fixture
def panel(page: Page) -> Page:
    """The page with its panel open and a search on it."""
    text_search(page)
    page.get_by_role("button", name="Filters").click()
    expect(page.get_by_role("group", name="colour")).to_be_visible()
    return page


def found(service: str, **options: Any) -> list[int]:
    with Client(service) as client:
        return [hit.id for hit in client.search(text="picture number 5", k=60, **options)]


def test_the_panel_says_what_is_in_each_column(panel: Page) -> None:
    colour = panel.get_by_role("group", name="colour")
    expect(colour.get_by_role("checkbox")).to_have_count(4)
    assert sorted(colour.locator("small").all_inner_texts()) == ["37", "37", "38", "38"]
    number = panel.get_by_role("group", name="number")
    expect(number.locator(".bars i")).to_have_count(24)
    assert number.get_by_role("spinbutton").nth(1).get_attribute("placeholder") == "149"
    expect(panel.get_by_role("group", name="shard")).to_have_count(0)
    expect(panel.get_by_role("group", name="score")).to_have_count(0)  # all of them are 7


def test_values_ranges_texts_dates_and_scores_combine_and_live_in_the_link(
    panel: Page, service: str, browser: Browser
) -> None:
    colour = panel.get_by_role("group", name="colour")
    request, ids = search(panel, colour.get_by_label("red").check)
    assert request["filters"] == [{"column": "colour", "in": ["red"]}]
    request, ids = search(panel, colour.get_by_label("blue").check)
    assert ids == found(service, filters=request["filters"])
    field = panel.get_by_role("group", name="number").get_by_role("spinbutton")
    request, ids = search(panel, lambda: field.nth(0).fill("20"))
    request, ids = search(panel, lambda: field.nth(1).fill("120"))
    assert {"column": "number", "min": 20, "max": 120} in request["filters"]
    request, _ = search(panel, lambda: panel.get_by_label("caption contains").fill("NUMBER"))
    days = panel.get_by_role("group", name="taken").locator("input")
    request, _ = search(panel, lambda: days.nth(1).fill("2024-11-15"))
    assert {"column": "taken", "max": "2024-11-15~"} in request["filters"]
    request, ids = search(panel, lambda: panel.locator("#lowest").fill("0.1"))
    assert request["threshold"] == pytest.approx(0.1)
    assert ids == found(service, filters=request["filters"], threshold=0.1)
    expect(panel.locator("#filter-count")).to_have_text("5")
    hits(panel).first.hover()
    request, ids = search(panel, hits(panel).first.get_by_label("Add to the query").click)
    assert len(request["queries"]) == 2 and len(request["filters"]) == 4

    fresh = browser.new_context()
    other = fresh.new_page()
    again, again_ids = search(other, lambda: other.goto(panel.url))
    assert (again, again_ids) == (request, ids)
    expect(other.locator("#filter-count")).to_have_text("5")
    fresh.close()
    request, _ = search(panel, panel.get_by_role("button", name="Clear", exact=True).click)
    assert "filters" not in request and "threshold" not in request
    expect(colour.get_by_label("red")).not_to_be_checked()


def test_filters_alone_show_what_they_let_through(page: Page) -> None:
    page.get_by_role("button", name="Filters").click()
    request, ids = search(page, page.get_by_role("group", name="colour").get_by_label("green").check)
    assert "id" in request and len(ids) == 38
    expect(page.get_by_role("status")).to_contain_text("38 hits for what the filters let through")


def test_nothing_found_says_what_to_do(page: Page) -> None:
    page.goto(f'{page.url}#q=x&f={{"column":"number","min":9999}}')
    page.reload()
    expect(page.locator("#nothing-name")).to_have_text("Nothing found")
    _, ids = search(page, page.get_by_role("button", name="Clear the filters").click)
    assert len(ids) == min(60, ROWS)
    expect(page.locator("#nothing")).to_be_hidden()


@pytest.mark.parametrize("filter", ["{", "[]", '{"column":1}', '{"column":"a"}', '{"column":"a","in":[]}', "null"])
def test_a_filter_without_sense_is_none(page: Page, filter: str) -> None:
    page.goto(f"{page.url}#f={filter}&score=nonsense")
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()
