"""The languages of the page, other scripts, paper, and browsers without JavaScript."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import Browser, Page, expect

from tests.serve.page.browsing import Watched, in_chromium, text_search

pytestmark = in_chromium

LANGUAGES = ("en", "de", "zh", "fr", "es", "pt")


def test_all_languages_say_the_same(page: Page) -> None:
    words: dict[str, Any] = {
        language: page.evaluate(f"import('/page/words/{language}.js').then(words => words.default)")
        for language in LANGUAGES
    }

    def places(text: Any) -> set[str]:
        return set(re.findall(r"\{(\w+)\}", text if isinstance(text, str) else text["other"]))

    for language in LANGUAGES[1:]:
        assert list(words[language]) == list(words["en"]), language
        for name, text in words["en"].items():
            assert places(words[language][name]) == places(text), (language, name)
            assert isinstance(text, str) or "one" in words[language][name] or language == "zh"


@pytest.mark.parametrize(
    ("locale", "language", "words"),
    [
        ("de-AT", "de", "150 Bilder durchsuchen"),
        ("zh-TW", "zh", "搜索 150 张图片"),
        ("fr-CA", "fr", "Rechercher dans 150 images"),
        ("es-MX", "es", "Buscar en 150 imágenes"),
        ("pt-BR", "pt", "Pesquisar 150 imagens"),
        ("sv-SE", "en", "Search 150 images"),
    ],
)
def test_the_browser_s_language_is_spoken(
    browser: Browser, service: str, watched: Watched, locale: str, language: str, words: str
) -> None:
    context = browser.new_context(locale=locale, viewport={"width": 360, "height": 640})
    page = watched.watch(context.new_page())
    page.goto(service)
    expect(page.locator("#size")).to_have_text(words)
    assert page.evaluate("document.documentElement.lang") == language
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert watched.problems == []
    context.close()


def test_captions_run_as_their_script_does(page: Page) -> None:
    def answer(route: Any) -> None:
        content = route.fetch().json()
        content["hits"][0]["metadata"]["caption"] = "صورة منظر طبيعي"
        content["hits"][1]["metadata"]["caption"] = "a very long caption " * 40
        route.fulfill(json=content)

    page.route("**/v1/search", answer)
    text_search(page)
    direction = "part => getComputedStyle(part).direction"
    assert page.locator(".hit .caption").first.evaluate(direction) == "rtl"
    assert page.locator(".hit .caption").nth(2).evaluate(direction) == "ltr"
    assert page.locator(".hit").nth(1).locator(".caption").evaluate("caption => caption.clientHeight") < 50
    page.locator(".hit .picture").first.click()
    assert page.locator("#viewer-name").evaluate(direction) == "rtl"
    page.keyboard.press("ArrowRight")
    name = page.locator("#viewer-name")
    folded = name.evaluate("name => name.clientHeight")
    page.get_by_role("button", name="Show all").click()
    assert name.evaluate("name => name.clientHeight") > folded


def test_paper_has_the_query_and_not_the_buttons(page: Page) -> None:
    text_search(page)
    page.emulate_media(media="print")
    expect(page.locator("#printed")).to_contain_text("“picture number 5”")
    expect(page.locator("header")).to_be_hidden()
    expect(page.locator(".hit .picture").first).to_be_visible()


def test_without_javascript_it_says_so(browser: Browser, service: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(service)
    expect(page.locator("noscript p")).to_contain_text("POST /v1/search")
    context.close()
