"""Everything that the page can search by, in a real Chromium against a real service."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_batch.search.searcher import Searcher

pytest.importorskip("playwright")
from playwright.sync_api import Page, expect

from tests.serve.page.browsing import Watched, in_chromium, member, search, shown, text_search, type_text

pytestmark = in_chromium


def test_text(page: Page) -> None:
    request, ids = search(page, lambda: type_text(page, "picture number 5"))
    assert (
        request == {"text": "picture number 5", "modality": "image", "k": 60, "index": "pictures"}
        or "index" not in request
    )
    assert len(ids) == 60
    expect(page.get_by_role("status")).to_contain_text("hits for “picture number 5”")
    assert page.title() == "“picture number 5” – clip-batch"
    expect(page.locator("#welcome")).to_be_hidden()
    page.get_by_label("Search text").fill("something else")
    search(page, page.get_by_role("button", name="Search", exact=True).click)


def test_a_chosen_file(page: Page, index: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jpg"
    path.write_bytes(member(index, 12))
    _, ids = search(page, lambda: page.set_input_files("#file", path))
    assert ids[0] == 12
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
    _, ids = search(page, lambda: hand_over(page, event, member(index, 30), "handed.jpg", "image/jpeg"))
    assert ids[0] == 30
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
    request, ids = search(page, lambda: page.evaluate(script))
    assert (request["id"], ids[0]) == (wanted, wanted)


def test_an_image_url(page: Page, index: str, folder: Path) -> None:
    (folder / "web").mkdir()
    (folder / "web" / "there.jpg").write_bytes(member(index, 44))
    handler = partial(_Quiet, directory=str(folder / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/there.jpg"
        request, ids = search(page, lambda: type_text(page, url))
        server.shutdown()
        thread.join()
    assert (request["image_url"], ids[0]) == (url, 44)
    expect(page.locator(".chip")).to_contain_text("there.jpg")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_a_typed_embedding(page: Page, index: str) -> None:
    with Searcher(index) as searcher:
        vector = searcher.reconstruct([77])[0].tolist()
    _, ids = search(page, lambda: type_text(page, json.dumps(vector)))
    assert ids[0] == 77
    expect(page.locator(".chip")).to_contain_text("vector of 8")


@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize("shape", [(8,), (1, 8)])
def test_an_embedding_file(page: Page, index: str, tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    with Searcher(index) as searcher:
        vector = searcher.reconstruct([78])[0].astype(kind).reshape(shape)
    np.save(tmp_path / "v.npy", vector)
    request, ids = search(page, lambda: page.set_input_files("#file", tmp_path / "v.npy"))
    assert ids[0] == 78
    assert np.allclose(request["embedding"], vector.astype(np.float32).reshape(-1), atol=0)


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
