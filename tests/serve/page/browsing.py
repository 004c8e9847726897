"""What tests do with the web page and read from it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from clip_batch.search.searcher import Searcher

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if os.path.exists(path)), None)

in_chromium = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]
"""The marks of every test of the page."""

ROWS = 150
COLOURS = ("red", "green", "blue", "=1+1")
EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>" onmouseover=\'window.hacked=1\''
BROKEN = "000007"
"""Captions and links of sample 3 attack the page; the bytes of sample 7's picture are overwritten."""


class Watched:
    """The problems that a page logged and the requests that it sent; `expected` problems are no failure."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.expected = 0

    def watch(self, page: Page) -> Page:
        page.on(
            "console",
            lambda message: self.problems.append(message.text) if message.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        return page


def search(page: Page, act: Callable[[], Any]) -> tuple[dict[str, Any], list[int]]:
    """Call `act`, which searches; return the request and the ids of the response, once the page shows them."""
    first = re.compile(r'"k":60\b')

    def is_first(response: Any) -> bool:
        return response.url.endswith("/v1/search") and bool(first.search(response.request.post_data or ""))

    with page.expect_response(is_first) as caught:
        act()
    request = json.loads(caught.value.request.post_data or "")
    assert caught.value.ok, caught.value.text()
    ids = [hit["id"] for hit in caught.value.json()["hits"]]
    page.wait_for_function(SHOWS, arg=ids)
    return request, ids


SHOWS = """ids => {
    const cards = [...document.querySelectorAll(".hit")];
    const same = cards.every(card => ids[card.dataset.place] == card.dataset.id);
    return document.title != "clip-batch search" && same && (ids.length ? cards[0]?.dataset.place == 0 : !cards.length);
}"""
"""Whether the cards that exist, which are those near the screen, are the first of these ids."""


def type_text(page: Page, text: str) -> None:
    page.get_by_label("Search text").fill(text)
    page.get_by_label("Search text").press("Enter")


def text_search(page: Page, text: str = "picture number 5") -> list[int]:
    """Search for a text and return the ids of the hits."""
    return search(page, lambda: type_text(page, text))[1]


def hits(page: Page) -> Any:
    """Return the locator of the hits."""
    return page.locator("#hits .hit")


def shown(page: Page) -> list[int]:
    """Return the ids of the hits near the screen, of which alone the page has cards."""
    ids: list[int] = page.evaluate("[...document.querySelectorAll('.hit')].map(hit => +hit.dataset.id)")
    return ids


def row_of(index: str, key: str) -> int:
    """Return the id of the row with a key."""
    with Searcher(index) as searcher:
        rows = searcher.metadata(list(range(searcher.manifest.rows)), ["key"])
    return next(id for id, row in enumerate(rows) if row["key"] == key)


def member(index: str, id: int) -> bytes:
    """Return the bytes of a row's picture in its tar."""
    with Searcher(index) as searcher:
        row = searcher.metadata([id])[0]
    with open(row["shard"], "rb") as file:
        file.seek(row["offset"])
        return file.read(row["length"])
