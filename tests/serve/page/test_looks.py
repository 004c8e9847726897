"""How the page looks, in colours, on narrow screens and to screen readers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("playwright")
from playwright.sync_api import Browser, Page

from tests.serve.page.browsing import Watched, hits, in_chromium, search, text_search

pytestmark = in_chromium


def test_a_narrow_screen_does_not_scroll_sideways(browser: Browser, service: str, watched: Watched) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page = watched.watch(context.new_page())
    page.goto(service)
    text_search(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    tops = page.evaluate("[...document.querySelectorAll('.hit')].slice(0, 2).map(hit => hit.offsetTop)")
    assert tops[0] == tops[1], "two pictures side by side, at least"
    hits(page).first.locator(".picture").tap()
    assert page.get_by_role("dialog").bounding_box()["width"] == 360  # type: ignore[index]
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert watched.problems == []
    context.close()


BACK = "getComputedStyle(document.body).backgroundColor"


def test_dark_and_light(browser: Browser, service: str) -> None:
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(service)
    assert lightness(page.evaluate(BACK)) < 0.1
    button = page.get_by_label("Colours:")
    button.click()
    assert (button.get_attribute("aria-label"), lightness(page.evaluate(BACK)) < 0.1) == ("Colours: dark", True)
    button.click()
    assert button.get_attribute("aria-label") == "Colours: light"
    assert lightness(page.evaluate(BACK)) > 0.9
    page.reload()
    assert lightness(page.evaluate(BACK)) > 0.9
    button.click()
    assert lightness(page.evaluate(BACK)) < 0.1
    context.close()


def lightness(colour: str) -> float:
    """Relative luminance of an "rgb(...)", as WCAG 2.2 defines it."""
    parts = np.array([float(part) for part in re.findall(r"[\d.]+", colour)[:3]]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: Browser, service: str, scheme: Any) -> None:
    """Contrast of 4.5 to 1 (WCAG 2.2, AA)."""
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(service)
    text_search(page)
    back = lightness(page.evaluate(BACK))
    for place in ("#note", ".caption", ".score", "h1", "h1 span"):
        text = lightness(page.locator(place).first.evaluate("part => getComputedStyle(part).color"))
        assert (max(text, back) + 0.05) / (min(text, back) + 0.05) >= 4.5, place
    context.close()


def test_everything_has_a_name(page: Page, index: str) -> None:
    text_search(page)
    hits(page).nth(3).hover()
    search(page, hits(page).nth(3).get_by_label("Find similar").click)
    script = """[...document.querySelectorAll('button, a, input, select, [role], dialog')].filter(part => !(
        part.ariaLabel || part.getAttribute('aria-labelledby') || part.textContent.trim() || part.labels?.length))
        .filter(part => part.id != 'note' && part.checkVisibility()).map(part => part.outerHTML)"""
    assert page.evaluate(script) == []
    assert page.evaluate("[...document.querySelectorAll('img')].every(image => image.hasAttribute('alt'))")
    assert page.evaluate("document.documentElement.lang") == "en"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(outline) == "solid"
