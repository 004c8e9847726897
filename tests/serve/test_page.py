"""The web page in a real Chromium, against a real service."""

from __future__ import annotations

import base64
import contextlib
import csv
import http.server
import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from clip_batch.client import Client
from clip_batch.search.searcher import Searcher
from tests.corpus import encode, good_tar, picture, write_tar
from tests.servers.serving import index_of, running

pytest.importorskip("playwright")
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if os.path.exists(path)), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

ROWS = 150
EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>" onmouseover=\'window.hacked=1\''
BROKEN = "000007"
"""Captions and links of sample 3 attack the page; the bytes of sample 7's picture are overwritten."""


def samples() -> list[tuple[str, bytes]]:
    """150 pictures, wide and high, with captions, addresses and sizes."""
    files = []
    for i in range(ROWS):
        shape = [(40, 40), (64, 40), (40, 56)][i % 3]
        caption = EVIL if i == 3 else f"picture number {i}, with a comma"
        url = "javascript:window.hacked=1" if i == 3 else f"https://example.org/{i}?a=1&b=2"
        fields = {"url": url, "width": shape[0], "height": shape[1], "number": i}
        files += [
            (f"{i:06d}.jpg", encode(picture(i, 64).resize(shape))),
            (f"{i:06d}.txt", caption.encode()),
            (f"{i:06d}.json", json.dumps(fields).encode()),
        ]
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def index(folder: Path) -> str:
    (folder / "main").mkdir()
    tar = write_tar(str(folder / "main" / "0.tar"), samples())
    made = index_of([tar], folder / "main")
    with tarfile.open(tar) as opened:
        member = opened.getmember(f"{BROKEN}.jpg")
    with open(tar, "r+b") as file:
        file.seek(member.offset_data)
        file.write(bytes(member.size))
    return made


@pytest.fixture(scope="module")
def other(folder: Path) -> str:
    """An index of a compressed tar: its pictures cannot be shown."""
    (folder / "other").mkdir()
    return index_of([good_tar(str(folder / "other" / "0.tar"), 9, seed=5)], folder / "other")


@pytest.fixture(scope="module")
def service(folder: Path, index: str, other: str) -> Iterator[str]:
    options = ["--image-url", "--image-url-private"]
    for number, head in enumerate(("safety", "violence", "aesthetic")):
        path = folder / f"{head}.npy"
        np.save(path, np.random.default_rng(number).standard_normal((1, 8)).astype(np.float32) * 9)
        options += [f"--{head}-head", str(path)]
    with running({"pictures": index, "other": other}, *options) as url:
        yield url


@pytest.fixture(scope="module")
def guarded(index: str) -> Iterator[str]:
    with running({"pictures": index}, token="open-sesame") as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-background-networking"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


class Watched:
    """What a page did that no test asked for."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.expected = 0

    def watch(self, page: Page) -> Page:
        page.on("console", lambda said: self.problems.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        return page


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context(viewport={"width": 1000, "height": 700})
    made.set_default_timeout(20_000)
    yield made
    made.close()


@pytest.fixture
def page(context: BrowserContext, service: str, watched: Watched) -> Iterator[Page]:
    """The page before any search; afterwards it has complained of nothing and asked nobody else."""
    made = watched.watch(context.new_page())
    made.goto(service)
    expect(made.locator("#size")).to_have_text("Search 159 images")
    yield made
    assert made.evaluate("window.hacked") is None
    assert len(watched.problems) == watched.expected, watched.problems
    assert [url for url in watched.requests if not url.startswith((service, "blob:"))] == []


Answer = dict[str, Any]


def search(page: Page, act: Callable[[], Any]) -> tuple[dict[str, Any], list[int]]:
    """Do what searches; what the page asked, and the ids it shows then, which are the answer's."""
    first = re.compile(r'"k":60\b')

    def mine(answer: Any) -> bool:
        return answer.url.endswith("/v1/search") and bool(first.search(answer.request.post_data or ""))

    with page.expect_response(mine) as caught:
        act()
    asked = json.loads(caught.value.request.post_data or "")
    assert caught.value.ok, caught.value.text()
    wanted = [hit["id"] for hit in caught.value.json()["hits"]]
    ids = "[...document.querySelectorAll('.hit')].slice(0, wanted.length).map(hit => hit.dataset.id)"
    page.wait_for_function(f"wanted => {ids}.join() == wanted", arg=wanted)
    return asked, wanted


def type_text(page: Page, text: str) -> None:
    page.get_by_label("Search text").fill(text)
    page.get_by_label("Search text").press("Enter")


def text_search(page: Page, text: str = "picture number 5") -> list[int]:
    return search(page, lambda: type_text(page, text))[1]


def hits(page: Page) -> Any:
    return page.locator("#hits .hit")


def shown(page: Page) -> list[int]:
    found: list[int] = page.evaluate("[...document.querySelectorAll('.hit')].map(hit => +hit.dataset.id)")
    return found


def row_of(index: str, key: str) -> int:
    with Searcher(index) as searcher:
        rows = searcher.metadata(list(range(searcher.manifest.rows)), ["key"])
    return next(id for id, row in enumerate(rows) if row["key"] == key)


def member(index: str, id: int) -> bytes:
    with Searcher(index) as searcher:
        row = searcher.metadata([id])[0]
    with open(row["shard"], "rb") as file:
        file.seek(row["offset"])
        return file.read(row["length"])


# What can be searched by


def test_text(page: Page) -> None:
    asked, found = search(page, lambda: type_text(page, "picture number 5"))
    assert (
        asked == {"text": "picture number 5", "modality": "image", "k": 60, "index": "pictures"} or "index" not in asked
    )
    assert len(found) == 60
    expect(page.get_by_role("status")).to_contain_text("hits for “picture number 5”")
    assert page.title() == "“picture number 5” – clip-batch"
    expect(page.locator("#welcome")).to_be_hidden()
    page.get_by_label("Search text").fill("something else")
    search(page, page.get_by_role("button", name="Search", exact=True).click)


def test_a_chosen_file(page: Page, index: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jpg"
    path.write_bytes(member(index, 12))
    _, found = search(page, lambda: page.set_input_files("#file", path))
    assert found[0] == 12
    expect(page.locator(".chip")).to_contain_text("mine.jpg")
    assert page.locator(".chip img").evaluate("image => image.complete && image.naturalWidth > 0")


MAKE_FILE = "new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name, {type})"


def hand_over(page: Page, event: str, data: bytes, name: str, kind: str) -> None:
    """Paste or drop a file, as a browser does it."""
    script = f"""([event, data, name, type]) => {{
        const carried = new DataTransfer();
        carried.items.add({MAKE_FILE});
        const options = {{bubbles: true, cancelable: true}};
        document.body.dispatchEvent(event == "paste"
            ? new ClipboardEvent("paste", {{...options, clipboardData: carried}})
            : new DragEvent(event, {{...options, dataTransfer: carried}}));
    }}"""
    page.evaluate(script, [event, base64.b64encode(data).decode(), name, kind])


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_a_file_that_is_handed_over(page: Page, index: str, event: str) -> None:
    text_search(page)
    _, found = search(page, lambda: hand_over(page, event, member(index, 30), "handed.jpg", "image/jpeg"))
    assert found[0] == 30
    expect(page.locator(".chip")).to_have_count(1)
    assert page.get_by_label("Search text").input_value() == ""


def test_what_is_dragged_over_it_is_welcome(page: Page) -> None:
    hand_over(page, "dragover", b"", "x.jpg", "image/jpeg")
    expect(page.locator("body")).to_have_class("dropping")
    page.evaluate("document.body.dispatchEvent(new DragEvent('dragleave', {bubbles: true}))")
    expect(page.locator("body")).not_to_have_class("dropping")


def test_a_hit_that_is_dropped_on_the_page(page: Page) -> None:
    text_search(page)
    script = """() => {
        const carried = new DataTransfer();
        carried.setData("text/uri-list", document.querySelectorAll(".hit img")[4].src);
        document.body.dispatchEvent(new DragEvent("drop", {bubbles: true, cancelable: true, dataTransfer: carried}));
    }"""
    wanted = shown(page)[4]
    asked, found = search(page, lambda: page.evaluate(script))
    assert (asked["id"], found[0]) == (wanted, wanted)


def test_an_image_url(page: Page, index: str, folder: Path) -> None:
    (folder / "web").mkdir()
    (folder / "web" / "there.jpg").write_bytes(member(index, 44))
    handler = partial(_Quiet, directory=str(folder / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/there.jpg"
        asked, found = search(page, lambda: type_text(page, url))
        server.shutdown()
        thread.join()
    assert (asked["image_url"], found[0]) == (url, 44)
    expect(page.locator(".chip")).to_contain_text("there.jpg")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_a_typed_embedding(page: Page, index: str) -> None:
    with Searcher(index) as searcher:
        vector = searcher.reconstruct([77])[0].tolist()
    _, found = search(page, lambda: type_text(page, json.dumps(vector)))
    assert found[0] == 77
    expect(page.locator(".chip")).to_contain_text("vector of 8")


@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize("shape", [(8,), (1, 8)])
def test_an_embedding_file(page: Page, index: str, tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    with Searcher(index) as searcher:
        vector = searcher.reconstruct([78])[0].astype(kind).reshape(shape)
    np.save(tmp_path / "v.npy", vector)
    asked, found = search(page, lambda: page.set_input_files("#file", tmp_path / "v.npy"))
    assert found[0] == 78
    assert np.allclose(asked["embedding"], vector.astype(np.float32).reshape(-1), atol=0)


def test_what_is_no_embedding_is_said_so(page: Page, tmp_path: Path) -> None:
    np.save(tmp_path / "i.npy", np.arange(8))
    np.save(tmp_path / "two.npy", np.zeros((2, 8), np.float32))
    np.save(tmp_path / "nan.npy", np.full(8, np.nan, np.float32))
    (tmp_path / "no.npy").write_bytes(b"hello")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'shape': (8,)}")
    (tmp_path / "no.txt").write_text("hello")
    (tmp_path / "no.json").write_text('{"a": 1}')
    told = page.get_by_role("status")
    for name, words in {
        "i.npy": "<i8", "two.npy": "one vector", "nan.npy": "NaN", "no.npy": "not a .npy", "cut.npy": "truncated",
        "no.txt": "neither", "no.json": "JSON array",
    }.items():  # fmt: skip
        page.set_input_files("#file", tmp_path / name)
        expect(told).to_contain_text(words)
    type_text(page, "[1, 2, oops")
    expect(told).to_contain_text("JSON array")


def test_what_the_service_refuses_is_said_so(page: Page, watched: Watched) -> None:
    watched.expected = 1
    type_text(page, "[1, 2, 3]")
    expect(page.get_by_role("status")).to_contain_text("Cannot search")
    expect(page.get_by_role("status")).to_contain_text("8")


# Going on from a hit


def test_a_click_finds_similar_ones_and_back_goes_back(page: Page) -> None:
    before = text_search(page)
    asked, found = search(page, hits(page).nth(3).locator(".picture").click)
    assert (asked["id"], found[0]) == (before[3], before[3])
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
    asked, found = search(page, hits(page).nth(2).get_by_label("Subtract from the query").click)
    terms = [{"id": first[1], "weight": 1}, {"id": third, "weight": -0.5}, {"text": "picture number 5", "weight": 1}]
    assert asked["queries"] == terms
    with Client(service) as client:
        assert [hit.id for hit in client.search(queries=terms, k=60)] == found

    page.get_by_label("Search text").fill("a shadow")
    asked, _ = search(page, page.get_by_label("Subtract the text from the query").click)
    assert asked["queries"][2] == {"text": "a shadow", "weight": -0.5}
    assert page.get_by_label("Search text").input_value() == ""
    expect(page.locator(".chip")).to_have_count(3)
    expect(page.locator(".chip.less")).to_have_count(2)

    weight = page.locator(".chip").nth(0).get_by_role("spinbutton")
    weight.fill("0.25")
    asked, _ = search(page, lambda: weight.press("Tab"))
    assert asked["queries"][0] == {"id": first[1], "weight": 0.25}
    asked, _ = search(page, page.locator(".chip").nth(1).get_by_role("button").click)
    assert [term.get("id") for term in asked["queries"]] == [first[1], None]
    asked, _ = search(page, lambda: page.get_by_label("Search text").press("Backspace"))
    assert len(asked["queries"]) == 1
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


# What a hit shows


def test_captions_scores_links_and_shapes(page: Page, index: str, service: str) -> None:
    found = text_search(page)
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
    assert len(found) == 60


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
    _, found = search(page, card.locator(".picture").click)
    assert found[0] == broken


# Options


def test_toggles_of_what_is_on(page: Page, service: str) -> None:
    all_rows = text_search(page, "picture")
    for name, flag in {"Unique": "deduplicate", "Safe": "safety", "No violence": "violence"}.items():
        asked, found = search(page, page.get_by_text(name, exact=True).click)
        assert asked[flag] is True
        with Client(service) as client:
            assert [hit.id for hit in client.search(text="picture", k=60, **{flag: True})] == found
        search(page, page.get_by_text(name, exact=True).click)
    slider = page.get_by_label("Aesthetic")
    asked, found = search(page, lambda: slider.fill("0.5"))
    assert asked["aesthetic"] == 0.5
    assert found != all_rows


def test_a_new_version_of_the_index_is_searched_from_the_start(page: Page) -> None:
    swapped = []

    def answer(route: Any) -> None:
        found = route.fetch().json()
        if '"k":120' in route.request.post_data and not swapped:
            swapped.append(found)
            found |= {"version": "another", "hits": found["hits"][::-1]}
        route.fulfill(json=found)

    page.route("**/v1/search", answer)
    wanted = text_search(page)
    for _ in range(100):
        page.mouse.wheel(0, 3000)
        page.wait_for_timeout(100)
        if len(shown(page)) >= 120:
            break
    assert len(swapped) == 1
    assert len(shown(page)) >= 120
    assert shown(page)[:60] == wanted
    assert len(set(shown(page))) == len(shown(page))


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
    asked, _ = search(page, page.get_by_text("Captions", exact=True).click)
    assert asked["modality"] == "text"
    expect(hits(page).first.locator(".caption")).to_have_text("picture number 8, with a comma")


def test_another_index(page: Page) -> None:
    text_search(page)
    search(page, hits(page).nth(3).locator(".picture").click)
    page.get_by_label("Index").select_option("other")
    expect(page.locator(".chip")).to_have_count(0)  # it was a row of the other index
    asked, found = search(page, lambda: type_text(page, "caption"))
    assert (asked["index"], len(found)) == ("other", 9)


# Addresses, files, keys


def test_an_address_says_it_all(page: Page, browser: Browser, service: str, index: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jpg").write_bytes(member(index, 12))
    search(page, lambda: page.set_input_files("#file", tmp_path / "mine.jpg"))
    page.get_by_label("Search text").fill("100% ~ of & # +")
    search(page, page.get_by_label("Subtract the text from the query").click)
    search(page, page.get_by_text("Unique", exact=True).click)
    search(page, page.get_by_text("Captions", exact=True).click)
    asked, found = search(page, lambda: type_text(page, "more"))
    fresh = browser.new_context()
    again = fresh.new_page()
    again_asked, again_found = search(again, lambda: again.goto(page.url))
    assert (again_asked, again_found) == (asked, found)
    expect(again.locator(".chip")).to_have_count(2)
    assert again.get_by_label("Search text").input_value() == "more"
    assert asked["queries"][1]["text"] == "100% ~ of & # +"
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
        found = json.loads(path.read_text())["hits"]
        rows = [{"id": hit["id"], "score": hit["score"], **hit["metadata"]} for hit in found]
    elif kind == "csv":
        rows = list(csv.DictReader(io.StringIO(path.read_text(), newline="")))
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
    asked, _ = search(page, lambda: page.keyboard.press("-"))
    assert asked["queries"][0] == {"id": ids[1], "weight": -0.5}
    page.get_by_label("Search text").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("i")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    wanted = shown(page)[0]
    asked, _ = search(page, lambda: page.keyboard.press("Enter"))
    assert asked["id"] == wanted
    page.keyboard.press("Tab")
    page.locator("#hits .picture").first.focus()
    page.keyboard.press("/")
    expect(page.get_by_label("Search text")).to_be_focused()
    stops = page.evaluate(
        "[...document.querySelectorAll('#hits button, #hits a')].filter(part => part.tabIndex == 0).length"
    )
    assert stops <= 5


# How it looks


def test_a_narrow_screen_does_not_scroll_sideways(browser: Browser, service: str, watched: Watched) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page = watched.watch(context.new_page())
    page.goto(service)
    text_search(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert hits(page).first.locator(".acts").evaluate("acts => getComputedStyle(acts).opacity") == "1"
    tops = page.evaluate("[...document.querySelectorAll('.hit')].slice(0, 2).map(hit => hit.offsetTop)")
    assert tops[0] == tops[1], "two pictures side by side, at least"
    hits(page).first.get_by_label("Details").tap()
    assert page.get_by_role("dialog").bounding_box()["width"] <= 340  # type: ignore[index]
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
    search(page, hits(page).nth(3).locator(".picture").click)
    script = """[...document.querySelectorAll('button, a, input, select, [role], dialog')].filter(part => !(
        part.ariaLabel || part.getAttribute('aria-labelledby') || part.textContent.trim() || part.labels?.length))
        .filter(part => part.id != 'note').map(part => part.outerHTML)"""
    assert page.evaluate(script) == []
    assert page.evaluate("[...document.querySelectorAll('img')].every(image => image.hasAttribute('alt'))")
    assert page.evaluate("document.documentElement.lang") == "en"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(outline) == "solid"


# Between page and service


def test_only_the_last_search_is_shown(page: Page) -> None:
    held: list[Any] = []
    page.route(
        "**/v1/search", lambda route: held.append(route) if "slow" in route.request.post_data else route.continue_()
    )
    type_text(page, "slow one")
    page.wait_for_timeout(200)
    expect(page.get_by_role("status")).to_have_text("Searching…")
    wanted = text_search(page, "quick one")
    for route in held:
        with contextlib.suppress(Exception):  # the page has given it up
            route.continue_()
    page.wait_for_timeout(300)
    assert shown(page)[:60] == wanted
    expect(page.get_by_role("status")).to_contain_text("quick one")


def test_not_now_is_asked_again(page: Page, watched: Watched) -> None:
    watched.expected = 1  # Chromium tells of the 503
    asked = []

    def answer(route: Any) -> None:
        asked.append(route)
        if len(asked) == 1:
            route.fulfill(status=503, headers={"retry-after": "1"}, body="{}")
        else:
            route.continue_()

    page.route("**/v1/search", answer)
    type_text(page, "patience")
    expect(page.get_by_role("status")).to_contain_text("hits for “patience”")


def test_a_service_that_is_gone_is_said_so(page: Page, watched: Watched) -> None:
    watched.expected = 1
    page.route("**/v1/search", lambda route: route.abort())
    type_text(page, "anybody")
    expect(page.get_by_role("status")).to_have_text("Cannot search: the service cannot be reached")


def test_the_token_is_asked_for_and_opens_pictures_too(context: BrowserContext, guarded: str) -> None:
    page = context.new_page()
    page.goto(guarded)
    expect(page.get_by_role("dialog")).to_be_visible()
    for token in ("wrong", "open-sesame"):
        page.locator("#token").fill(token)
        page.locator("#token").press("Enter")
    expect(page.locator("#size")).to_have_text("Search 150 images")
    text_search(page)
    page.wait_for_function("() => document.querySelector('.hit img').naturalWidth > 0")
    page.reload()
    expect(page.locator(".hit").first).to_be_visible()


def test_the_page_may_load_nothing_from_elsewhere(service: str, page: Page) -> None:
    answer = page.request.get(service)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert page.request.get(f"{service}/page/page.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert page.request.get(f"{service}/page/nothing.js").status == 404
    for path in ("/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page/.../x"):
        assert page.request.get(service + path).status == 404
    tag = answer.headers["etag"]
    assert page.request.get(service, headers={"if-none-match": tag}).status == 304


TIMED = """() => {
    const real = fetch;
    window.fetch = async (path, options) => {
        const answer = await real(path, options);
        if (!options.body?.includes('"k":60')) return answer;
        const text = await answer.text();
        window.answered = performance.now();
        window.pictured = 0;
        return new Response(text, answer);
    };
    const look = ({target}) => target.closest?.(".hit") && (window.pictured ||= performance.now());
    document.addEventListener("load", look, true);
}"""


def test_the_first_picture_is_there_soon_after_the_answer(page: Page) -> None:
    """Within 100 ms; best of some, as others may load this machine."""
    page.evaluate(TIMED)
    took = []
    for word in ("one", "two", "three", "four", "five", "six", "seven", "eight"):
        text_search(page, f"picture {word}")
        page.wait_for_function("() => window.pictured")
        took.append(page.evaluate("pictured - answered"))
    assert min(took) < 100, took
