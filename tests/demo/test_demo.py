"""`clip-batch demo` and the commands it names, as a person runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_batch.embeddings.commits import committed, read_commits
from clip_batch.index.manifest import load_manifest
from clip_batch.search.searcher import Searcher
from clip_batch.storage.store import Store
from tests import ROOT

pytestmark = pytest.mark.slow


def run(*arguments: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "clip_batch", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("demo") / "d"
    text = run("demo", str(home), "--no-serve")
    assert text.count("== search") == 6
    first = [line for line in text.splitlines() if line.strip().startswith("1  ")]
    assert "red apple" in first[0]
    assert "flag: Brazil" in first[2]
    (home / "printed.txt").write_text(text)
    return home


def test_running_it_again_changes_nothing(folder: Path) -> None:
    before = sorted(str(path) for path in (folder / "embeddings").rglob("*"))
    run("demo", str(folder), "--no-serve")
    assert sorted(str(path) for path in (folder / "embeddings").rglob("*")) == before


def test_every_command_on_it(folder: Path, tmp_path: Path) -> None:
    out, index = str(folder / "embeddings"), str(folder / "index")
    assert json.loads(run("status", "--output", out, "--json"))["missing"] == []
    assert json.loads(run("verify", "--output", out, "--deep", "--json"))["rows"] == 1911
    assert json.loads(run("verify", "--index", index, "--deep", "--json"))["ok"]
    assert "0 files removed" in run("gc", "--output", out)
    assert "0 partitions done" in run("repair", "--output", out)
    assert "ok" in run("doctor", "--output", out)
    for text in ("watermelon", "西瓜"):
        hits = json.loads(run("search", "--index", index, "--text", text, "-k", "3", "--json"))
        assert any("watermelon" in hit["metadata"]["caption"] for hit in hits)
    vector = tmp_path / "v.npy"
    with Searcher(index) as searcher:
        np.save(vector, searcher.reconstruct([5]))
    assert json.loads(run("search", "--index", index, "--embedding", str(vector), "--json"))[0]["id"] == 5


def test_a_missing_partition_is_named_and_not_merged(folder: Path, tmp_path: Path) -> None:
    import shutil

    out = str(tmp_path / "out")
    shutil.copytree(folder / "embeddings", out)
    os.unlink(f"{out}/_clip_batch/commits/0002.json")
    done = subprocess.run(
        [sys.executable, "-m", "clip_batch", "merge", "--output", out, "--index", str(tmp_path / "index")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "--partitions 2" in done.stderr
    assert not (tmp_path / "index" / "CURRENT").exists()
    run("verify", "--output", out, code=1)
    run("worker", "--output", out, "--partitions", "2")
    assert json.loads(run("verify", "--output", out, "--deep", "--json"))["ok"]


def test_every_row_finds_itself_after_kill_and_resume_with_other_slots(folder: Path, tmp_path: Path) -> None:
    out, index = str(tmp_path / "out"), str(tmp_path / "index")
    run("plan", "--input", str(folder / "tars"), "--model", "demo", "--partition-samples", "100", "--output", out)
    process = subprocess.Popen(
        [sys.executable, "-m", "clip_batch", "worker", "--output", out, "--slot", "0", "--slots", "1"],
        stderr=subprocess.DEVNULL,
    )
    while not committed(Store(out)) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = committed(Store(out))
    assert 0 < len(done) < 20
    for slot in range(3):
        run("worker", "--output", out, "--slot", str(slot), "--slots", "3")
    run("merge", "--output", out, "--index", index, "--shard-rows", "700")
    store = Store(out)
    where = {}
    for number, commit in read_commits(store).items():
        for row, vector in enumerate(np.load(store.path(commit.file("img_emb") or "")).astype(np.float32)):
            where[number, row] = vector
    assert len(where) == 1911
    with Searcher(index) as searcher:
        metadata = searcher.metadata(list(range(1911)))
        vectors = np.stack([where[row["partition"], row["row"]] for row in metadata])
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        scores, ids = searcher.search_ids(vectors, k=1)
        assert np.allclose(scores[:, 0], 1, atol=1e-5)
        twins = [row for row, id in enumerate(ids[:, 0]) if id != row]
        assert all(np.allclose(vectors[row], vectors[ids[row, 0]], atol=1e-3) for row in twins)
        assert len({(row["partition"], row["row"]) for row in metadata}) == 1911
    manifest = load_manifest(Store(index))
    assert manifest.recall["image"]["text"]["10"] == 1.0
    assert len(manifest.shards) == 3


def get(url: str, body: Any = None) -> tuple[int, bytes, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read(), answer.headers["content-type"]
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers["content-type"]


@pytest.fixture(scope="module")
def service(folder: Path) -> Any:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "clip_batch", "serve", "--index", str(folder / "index"), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert "serving" in process.stdout.readline()
    url = f"http://127.0.0.1:{port}"
    for _ in range(100):
        try:
            get(f"{url}/healthz")
            break
        except urllib.error.URLError:
            time.sleep(0.1)
    yield url
    process.terminate()
    process.communicate(timeout=20)


def test_the_snippet_of_demo_md_finds_the_same_by_both_languages(service: str) -> None:
    text = (ROOT / "docs" / "demo.md").read_text()
    snippet = textwrap.dedent(re.findall(r"(?m)(?:^(?:    .*)?\n)+", text[text.index("from Python") :])[0])
    snippet = snippet.replace("http://127.0.0.1:1234", service)
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["watermelon watermelon. 西瓜", "西瓜 watermelon. 西瓜"], done.stderr


def test_the_service_answers_and_serves_images(service: str) -> None:
    code, body, _ = get(f"{service}/v1/search", {"text": "watermelon", "k": 4})
    hits = json.loads(body)["hits"]
    assert code == 200
    assert len(hits) == 4
    assert "watermelon" in hits[0]["metadata"]["caption"]
    code, body, kind = get(service + hits[0]["image"])
    assert (code, kind, body[:3]) == (200, "image/jpeg", b"\xff\xd8\xff")
    code, body, _ = get(f"{service}/v1/search", {"id": hits[0]["id"], "k": 1})
    assert json.loads(body)["hits"][0]["id"] == hits[0]["id"]
    assert json.loads(get(f"{service}/readyz")[1])["indices"] == {"index": 1911}
    assert b"clip-batch" in get(service)[1]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, 422),
        ({"text": "a", "id": 3}, 422),
        ({"text": "a", "k": 0}, 422),
        ({"text": "a", "k": 10**6}, 422),
        ({"text": "a", "nonsense": 1}, 422),
        ({"text": "a", "index": "other"}, 404),
        ({"embedding": [1.0, 2.0]}, 400),
        ({"embedding": ["x"]}, 422),
        ({"image": "!!"}, 422),
        ({"image": "aGVsbG8="}, 400),
        ({"id": 10**9}, 404),
        ({"id": -1}, 422),
        ({"text": "x" * 20_000}, 422),
        ([], 422),
    ],
)
def test_a_bad_request_is_a_4xx(service: str, body: Any, code: int) -> None:
    found, text, _ = get(f"{service}/v1/search", body)
    assert found == code, text


def test_the_page_in_a_browser(service: str, tmp_path: Path) -> None:
    chromium = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if os.path.exists(path)), None)
    if chromium is None:
        pytest.skip("Chromium is not installed")
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page()
        problems: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url))
        for text in ("watermelon", "西瓜"):
            page.goto(service)
            page.get_by_label("Search text").fill(text)
            page.get_by_role("button", name="Search", exact=True).click()
            expect(page.locator(".hit").first).to_contain_text("watermelon", timeout=20_000)
        page.locator(".hit").nth(3).locator(".picture").click()
        page.locator("#like").click()
        page.wait_for_function("() => document.querySelector('#note').textContent.includes('images like')")
        page.set_input_files("#file", str(next(iter(_pictures(tmp_path)))))
        page.wait_for_function("() => document.querySelector('#note').textContent.includes('picture.jpg')")
        assert int(page.locator(".hit").first.get_attribute("aria-setsize") or 0) >= 60
        browser.close()
    assert problems == []
    assert all(re.match(r"(http://127\.0\.0\.1:|data:|blob:)", url) for url in requests), requests


def _pictures(folder: Path) -> list[Path]:
    from clip_batch.demo import data

    path = folder / "picture.jpg"
    path.write_bytes(data.load()["image"][100].as_py())
    return [path]
