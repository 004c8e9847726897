"""The indices, services and browser that the tests of the page share."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.corpus import encode, good_tar, picture, write_tar
from tests.serve.page.browsing import (
    BROKEN,
    CHROMIUM,
    COLOURS,
    EVIL,
    ROWS,
    Watched,
)
from tests.servers.serving import index_of, running

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page


def samples() -> list[tuple[str, bytes]]:
    """Return the members of a tar: ROWS pictures of three shapes, with captions, addresses and sizes."""
    files = []
    for i in range(ROWS):
        shape = [(40, 40), (64, 40), (40, 56)][i % 3]
        caption = EVIL if i == 3 else f"picture number {i}, with a comma"
        url = "javascript:window.hacked=1" if i == 3 else f"https://example.org/{i}?a=1&b=2"
        fields = {"url": url, "width": shape[0], "height": shape[1], "number": i, "colour": COLOURS[i % 4]}
        fields |= {"id": f"theirs {i}", "score": 7, "taken": f"2024-{1 + i % 12:02}-15T08:00"}
        files += [
            (f"{i:06d}.jpg", encode(picture(i, 64).resize(shape))),
            (f"{i:06d}.txt", caption.encode()),
            (f"{i:06d}.json", json.dumps(fields).encode()),
        ]
    return files


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="package")
def index(folder: Path) -> str:
    (folder / "main").mkdir()
    tar = write_tar(str(folder / "main" / "0.tar"), samples())
    index = index_of([tar], folder / "main")
    with tarfile.open(tar) as opened:
        member = opened.getmember(f"{BROKEN}.jpg")
    with open(tar, "r+b") as file:
        file.seek(member.offset_data)
        file.write(bytes(member.size))
    return index


@pytest.fixture(scope="package")
def other(folder: Path) -> str:
    """An index of a compressed tar, so its pictures cannot be shown."""
    (folder / "other").mkdir()
    return index_of([good_tar(str(folder / "other" / "0.tar"), 9, seed=5)], folder / "other")


@pytest.fixture(scope="package")
def service(folder: Path, index: str, other: str) -> Iterator[str]:
    options = ["--image-url", "--image-url-private"]
    for number, head in enumerate(("safety", "violence", "aesthetic")):
        path = folder / f"{head}.npy"
        np.save(path, np.random.default_rng(number).standard_normal((1, 8)).astype(np.float32) * 9)
        options += [f"--{head}-head", str(path)]
    with running({"pictures": index, "other": other}, *options) as url:
        yield url


@pytest.fixture(scope="package")
def guarded(index: str) -> Iterator[str]:
    with running({"pictures": index}, token="open-sesame") as url:
        yield url


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=20_000)  # others may load this machine
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-background-networking"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    context.set_default_timeout(20_000)
    context.add_init_script("localStorage.setItem('typing', 'off')")  # a test searches when it says so
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, service: str, watched: Watched) -> Iterator[Page]:
    """The page before any search. The test fails if it logs a problem or sends a request to anyone else."""
    from playwright.sync_api import expect

    page = watched.watch(context.new_page())
    page.goto(service)
    expect(page.locator("#size")).to_have_text("Search 150 images")
    yield page
    assert page.evaluate("window.hacked") is None
    assert len(watched.problems) == watched.expected, watched.problems
    assert [url for url in watched.requests if not url.startswith((service, "blob:"))] == []
