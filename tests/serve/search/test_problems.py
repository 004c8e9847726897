"""What a service says of what is wrong with it: at once, which file, and no paths of its machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from clip_batch.client import AsyncClient, Client
from clip_batch.encoders.families.fake import FakeEncoder
from clip_batch.errors import EncoderError, ServiceUnavailable
from clip_batch.search.searcher import Searcher
from clip_batch.serve.http.hidden import without_paths
from clip_batch.serve.search import encodings
from tests.serve.search.test_live import wait
from tests.servers.processes import free_ports
from tests.servers.serving import ROWS, make_index, running, served


@pytest.fixture
def index(tmp_path: Path) -> str:
    return make_index(tmp_path / "a private folder")


def ask(url: str, **body: Any) -> tuple[int, Any, dict[str, str]]:
    """Return status, answer and headers of a search, or of /readyz without a body."""
    data = json.dumps(body).encode() if body else None
    try:
        with urllib.request.urlopen(f"{url}/v1/search" if body else f"{url}/readyz", data, timeout=20) as response:
            return response.status, json.load(response), dict(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), dict(error.headers)


async def search(url: str) -> None:
    async with AsyncClient(url) as client:
        await client.search("a")


@pytest.mark.slow
def test_weights_that_are_missing(index: str, tmp_path: Path) -> None:
    weights = f"local-dir:{tmp_path}/weights"
    with running({"index": index}, "--model", weights, "--poll", "0.5", ready="/healthz") as url:
        wait(lambda: "being loaded" not in str(ask(url)[1]["problems"]))
        status, answer, headers = ask(url, text="a")
        assert (status, headers["retry-after"]) == (503, "5")
        assert "weights" in answer["error"] and answer["error"] in answer["detail"]
        assert str(tmp_path) not in json.dumps([answer, ask(url)[1]]), "no path of the server"
        assert ask(url, id=1)[0] == 200, "needs no encoder"
        started = time.monotonic()
        with Client(url) as client, pytest.raises(ServiceUnavailable, match="weights"):
            client.search("a")
        with pytest.raises(ServiceUnavailable, match="weights"):
            asyncio.run(search(url))
        assert time.monotonic() - started < 3, "the client does not try again"


def test_a_known_problem_is_said_at_once_while_the_encoder_is_tried_again(
    index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, gate, mended = list[float](), threading.Event(), threading.Event()

    def encoder(_: Searcher) -> FakeEncoder:
        tries.append(time.monotonic())
        if mended.is_set():
            return FakeEncoder(8)
        if len(tries) > 1:
            gate.wait(20)
        raise EncoderError("the weights are missing")

    monkeypatch.setattr(Searcher, "encoder", property(encoder))
    with served(index, poll=0.05) as client:
        wait(lambda: len(tries) == 2)  # which goes on until the gate opens
        started = time.monotonic()
        answer = client.post("/v1/search", json={"text": "a"})
        assert (answer.status_code, answer.json()["error"]) == (503, "the weights are missing")
        assert "missing" in client.get("/readyz").json()["problems"]["index"]
        assert time.monotonic() - started < 5
        mended.set()
        gate.set()
        wait(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/v1/search", json={"text": "a"}).status_code == 200


def test_a_request_does_not_wait_for_ever_for_an_encoder(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(encodings, "PATIENCE", 0.1)
    monkeypatch.setattr(Searcher, "encoder", property(lambda _: (gate.wait(20), FakeEncoder(8))[1]))
    with served(index) as client:
        answer = client.post("/v1/search", json={"text": "a"})
        assert (answer.status_code, answer.headers["retry-after"], "error" in answer.json()) == (503, "5", False)
        gate.set()
        wait(lambda: client.post("/v1/search", json={"text": "a"}).status_code == 200)


@pytest.mark.parametrize("ending", ["arrow", "index"])
def test_a_file_that_was_cut_is_no_longer_read(index: str, ending: str) -> None:
    with served(index, poll=0.05) as client:
        wait(lambda: client.get("/readyz").status_code == 200)
        (path, *_) = sorted(Path(index).rglob(f"*.{ending}"))
        whole = path.read_bytes()
        os.truncate(path, len(whole) // 2)
        wait(lambda: client.get("/readyz").status_code == 503)
        answer = client.post("/v1/search", json={"id": 1})
        assert answer.status_code == 503 and path.name in answer.json()["error"]
        assert "private" not in answer.text + client.get("/readyz").text
        path.write_bytes(whole)
        wait(lambda: client.get("/readyz").status_code == 200)
        assert len(client.post("/v1/search", json={"id": 1, "k": 1000}).json()["hits"]) == ROWS


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["arrow", "index"])
def test_the_file_is_named_where_the_system_ends_the_process(index: str, ending: str) -> None:
    [port] = free_ports(1)
    command = [sys.executable, "-m", "clip_batch", "serve", "--index", index, "--port", str(port), "--poll", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return ask(url)[0] == 200
        except urllib.error.URLError:
            return False

    wait(answers, 60)
    cut = sorted(Path(index).rglob(f"*.{ending}"))
    for path in cut:
        os.truncate(path, 0)
    with contextlib.suppress(OSError):
        for row in range(ROWS):
            ask(url, id=row, k=ROWS)
    assert process.wait(30) == -signal.SIGBUS
    assert process.stderr is not None
    said = process.stderr.read()
    assert any(f"{path} became shorter while it was in use" in said for path in cut), said
    process.stderr.close()


def test_paths_are_shown_only_if_the_options_say_so(index: str) -> None:
    folder = str(Path(index).parent)
    with served(index) as client:
        for answer in (
            client.post("/v1/search", json={"id": 1}),
            client.post("/v1/search", json={"id": 1, "columns": ["shard", "key"]}),
            client.post("/knn-service", json={"text": "a", "num_images": 9, "modality": "image"}),
            client.post("/metadata", json={"ids": [1]}),
            client.get("/v1/facts/index"),
            client.get("/v1/indices"),
            client.get("/readyz"),
        ):
            assert answer.status_code == 200 and "a private folder" not in answer.text
        assert client.post("/metadata", json={"ids": [1]}).json()[0]["metadata"]["shard"].endswith(".tar")
        assert client.get("/v1/image/index/1").status_code == 200
    with served(index, show_paths=True) as client:
        assert client.post("/metadata", json={"ids": [1]}).json()[0]["metadata"]["shard"].startswith(folder)
    Path(index, "CURRENT").write_text("0" * 12)
    for options, shown in (({}, False), ({"show_paths": True}, True), ({"show_paths": True, "token": "secret"}, False)):
        with served(index, **options) as client:
            assert (folder in client.get("/readyz").text) is shown  # which needs no token


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/my photos/index/0.arrow is missing", "index/0.arrow is missing"),
        ("no index at s3://bucket/a/b: merge", "no index at b: merge"),
        ("file:///etc/passwd, '/a/b' and (/c/d)", "passwd, 'b' and (d)"),
        ("put ~/x/y back", "put y back"),
        ("float16/32, and/or 3/4, a/b/c, text/plain", "float16/32, and/or 3/4, a/b/c, text/plain"),
        ("GET /v1", "GET /v1"),
    ],
)
def test_texts_without_paths(text: str, shown: str) -> None:
    assert without_paths(text, ["/data/my photos/index/"]) == shown
