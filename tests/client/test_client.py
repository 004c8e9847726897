"""`Client` and `AsyncClient` against a real service, and against one that does all that services should not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_batch.client import AsyncClient, Client, clients
from clip_batch.client.clients import back_off, retry_after
from clip_batch.errors import ClipBatchError, ConfigError, ServiceError, ServiceUnavailable
from clip_batch.search.searcher import Searcher
from clip_batch.types import Hit
from tests import ROOT
from tests.corpus import good_tar, jpeg
from tests.servers.serving import index_of, running

ROWS = 40

Call = Callable[..., Any]
"""(url, method, *arguments, options of the client, **arguments) -> what the method gives."""


def sync_call(url: str, method: str, *arguments: Any, client: dict[str, Any] | None = None, **named: Any) -> Any:
    with Client(url, **(client or {})) as made:
        found = getattr(made, method)(*arguments, **named)
        return list(found) if method == "search_many" else found


def async_call(url: str, method: str, *arguments: Any, client: dict[str, Any] | None = None, **named: Any) -> Any:
    async def run() -> Any:
        async with AsyncClient(url, **(client or {})) as made:
            found = getattr(made, method)(*arguments, **named)
            return [hits async for hits in found] if method == "search_many" else await found

    return asyncio.run(run())


@pytest.fixture(params=[sync_call, async_call], ids=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    found: Call = request.param
    return found


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("client")
    return index_of([good_tar(str(folder / "0.tar"), ROWS)], folder)


@pytest.fixture(scope="module")
def service(index: str) -> Iterator[str]:
    with running({"pictures": index}) as url:
        yield url


def test_the_lines_of_the_readme(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"\n    from clip_batch import Client\n(?:    .*\n|\n)*", (ROOT / "README.md").read_text())
    exec(textwrap.dedent(block).replace("http://127.0.0.1:1234", service), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert float(lines[0].split()[0]) >= float(lines[4].split()[0])


# A real service


def test_each_kind_of_query_finds_what_the_searcher_finds(call: Call, service: str, index: str, tmp_path: Path) -> None:
    path = tmp_path / "query.jpg"
    path.write_bytes(jpeg(3))
    with Searcher(index) as searcher:
        row = searcher.reconstruct([7])[0]
        wanted = searcher.search(row, k=5)[0]
        text = searcher.search(searcher.encode_text(["caption 3 of tar 0"]), k=5)[0]
        assert ids(call(service, "search", id=7, k=5)) == ids(wanted)
        assert ids(call(service, "search", id=np.int64(7), k=5)) == ids(wanted)
        assert ids(call(service, "search", embedding=row, k=5)) == ids(wanted)
        assert ids(call(service, "search", embedding=row.tolist(), k=5)) == ids(wanted)
        assert ids(call(service, "search", text="caption 3 of tar 0", k=5)) == ids(text)
        pictured = searcher.search(searcher.encode_image(path.read_bytes()), k=5)[0]
        assert ids(call(service, "search", image=path, k=5)) == ids(pictured)
        assert ids(call(service, "search", image=path.read_bytes(), k=5)) == ids(pictured)
    [first, *_] = call(service, "search", id=7, k=5)
    assert isinstance(first, Hit)
    assert first.id == 7
    assert first.score == pytest.approx(1, abs=1e-5)
    assert first.metadata["caption"].startswith("caption")


def ids(hits: list[Hit]) -> list[int]:
    return [hit.id for hit in hits]


def test_mixtures_and_options_arrive(call: Call, service: str, index: str) -> None:
    terms = [{"id": 1, "weight": 1.0}, {"text": "caption 5 of tar 0", "weight": -0.5}]
    with Searcher(index) as searcher:
        text = searcher.encode_text(["caption 5 of tar 0"])[0]
        mixed = searcher.reconstruct([1])[0] - 0.5 * text / np.linalg.norm(text)
        wanted = searcher.search(mixed / np.linalg.norm(mixed), k=ROWS)[0]
    options = {"k": ROWS, "columns": ["key"], "threshold": 0.1, "modality": "image", "index": "pictures"}
    found = call(service, "search", queries=terms, **options)
    assert ids(found) == [hit.id for hit in wanted if hit.score >= 0.1]
    assert {tuple(hit.metadata) for hit in found} == {("key",)}
    chosen = call(service, "search", id=1, k=ROWS, filters=[{"column": "number", "min": 30}])
    assert sorted(hit.metadata["number"] for hit in chosen) == list(range(30, 40))


def test_many_queries_are_answered_in_order(call: Call, service: str) -> None:
    queries = [{"id": i} for i in range(ROWS)]
    assert [hits[0].id for hits in call(service, "search_many", queries, k=1, concurrency=5)] == list(range(ROWS))
    texts = [f"caption {i} of tar 0" for i in (3, 9)]
    one_by_one = [call(service, "search", text=text, k=4) for text in texts]
    assert [ids(hits) for hits in call(service, "search_many", texts, k=4)] == [ids(hits) for hits in one_by_one]
    assert call(service, "search_many", []) == []


def test_vectors_of_more_texts_and_images_than_one_request_takes(call: Call, service: str, index: str) -> None:
    texts = [f"caption {i}" for i in range(37)]
    with Searcher(index) as searcher:
        wanted = searcher.encode_text(texts)
        pictured = searcher.encode_image(jpeg(5))
    found = call(service, "embed_text", texts)
    assert (found.dtype, found.shape) == (np.float32, (37, 8))
    assert np.allclose(found, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5)
    assert np.allclose(call(service, "embed_text", "caption 4", index="pictures"), found[4:5])
    image = call(service, "embed_image", [jpeg(4), jpeg(5)])
    assert np.allclose(image[1], pictured[0] / np.linalg.norm(pictured), atol=1e-5)
    assert len(call(service, "embed_text", [])) == 0


def test_images_metadata_and_what_there_is(call: Call, service: str, index: str) -> None:
    wanted = [5, 3, 38, 3]
    found = call(service, "metadata", "pictures", wanted)
    with Searcher(index) as searcher:
        rows = searcher.metadata(wanted)
    assert [row["key"] for row in found] == [row["key"] for row in rows]
    with tarfile.open(rows[0]["shard"]) as tar:
        member = tar.extractfile(f"{rows[0]['key']}.jpg")
        assert member is not None
        assert call(service, "image", "pictures", 5) == member.read()
    [served] = call(service, "indices")
    assert (served["name"], served["rows"], served["dim"]) == ("pictures", ROWS, 8)


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ({"text": "a", "k": 0}, 422, "k:"),
        ({"text": "a", "nonsense": 1}, 422, "nonsense"),
        ({}, 422, "exactly one"),
        ({"text": "a", "index": "other"}, 404, "other"),
        ({"embedding": [1.0]}, 400, "embedding"),
        ({"image": b"no image"}, 400, "image"),
        ({"id": 10**6}, 404, "row"),
        ({"image_url": "http://127.0.0.1/x.jpg"}, 400, "image_url"),
    ],
)
def test_what_the_service_refuses_is_an_error_that_says_so(
    call: Call, service: str, query: dict[str, Any], status: int, words: str
) -> None:
    with pytest.raises(ServiceError, match=words) as caught:
        call(service, "search", **query)
    assert caught.value.status == status
    assert not isinstance(caught.value, ServiceUnavailable)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "act", [lambda client: client.search("a"), lambda client: client.wait()], ids=["search", "wait"]
)
def test_a_client_that_is_closed_says_so(act: Any) -> None:
    client = Client("http://127.0.0.1:9")
    client.close()
    with pytest.raises(ConfigError, match=r"Client\('http://127.0.0.1:9'\) is closed: open another one"):
        act(client)

    async def later() -> None:
        client = AsyncClient("http://127.0.0.1:9")
        await client.close()
        await act(client)

    with pytest.raises(ConfigError, match="is closed"):
        asyncio.run(later())


def test_a_query_that_cannot_be_sent_is_refused_here(call: Call) -> None:
    for query in ({"image": "no/such.jpg"}, {"embedding": [1.0, float("nan")]}):
        with pytest.raises(ConfigError):
            call("http://127.0.0.1:9", "search", **query)
    with pytest.raises(ConfigError, match="http"):
        call("127.0.0.1:9", "search", text="a")


@pytest.fixture(scope="module")
def guarded(index: str) -> Iterator[str]:
    with running({"pictures": index}, token="open-sesame") as url:
        yield url


def test_the_token_is_sent_and_asked_for(call: Call, guarded: str) -> None:
    assert call(guarded, "search", id=2, k=1, client={"token": "open-sesame"})[0].id == 2
    for wrong in (None, "sesame"):
        with pytest.raises(ServiceError, match="token") as caught:
            call(guarded, "search", id=2, client={"token": wrong})
        assert caught.value.status == 401
    assert "sesame" not in repr(Client(guarded, token="open-sesame"))
    assert "secret" not in repr(Client("http://person:secret@localhost:9"))


# A hostile one: each request gets the next thing to do, the last one for ever

Act = tuple[int, dict[str, str], bytes] | str
"""A status with headers and body; or "drop" the connection, "hang", or "cut" the body short."""

GOOD: Act = (200, {}, json.dumps({"hits": [{"id": 4, "score": 0.5, "image": None, "metadata": {}}]}).encode())


class Hostile:
    """`url`; `seen` are the times of requests, `most` how many were at work at once."""

    def __init__(self, acts: list[Act], seconds: float = 0.0) -> None:
        self.acts, self.seconds = acts, seconds
        self.seen: list[float] = []
        self.tokens: list[str | None] = []
        self.now = self.most = 0
        self._lock, self.ended = threading.Lock(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hostile = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                hostile._answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            act = self.acts[min(len(self.seen), len(self.acts) - 1)]
            self.seen.append(time.monotonic())
            self.tokens.append(request.headers.get("authorization"))
            self.now += 1
            self.most = max(self.most, self.now)
        self.ended.wait(self.seconds)
        with self._lock:
            self.now -= 1
        request.close_connection = True
        if act == "hang":
            self.ended.wait(20)
        if isinstance(act, str) and act != "cut":
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        status, headers, body = GOOD if isinstance(act, str) else act
        request.send_response(status)
        for name, value in {"content-length": str(len(body) + 10 * (act == "cut")), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)


@contextlib.contextmanager
def hostile(*acts: Act, seconds: float = 0.0) -> Iterator[Hostile]:
    made = Hostile(list(acts), seconds)
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        made.ended.set()
        made.server.shutdown()
        thread.join()
        made.server.server_close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "back_off", lambda attempt: 0.01)


@pytest.mark.parametrize("act", ["drop", "cut", (503, {}, b"{}"), (429, {}, b""), (502, {}, b""), (504, {}, b"")])
def test_what_passes_is_tried_again(call: Call, act: Act) -> None:
    with hostile(act, act, GOOD) as service:
        assert call(service.url, "search", text="a") == [Hit(4, 0.5, {})]
        assert len(service.seen) == 3


def test_retry_after_is_honoured(call: Call) -> None:
    with hostile((503, {"retry-after": "1"}, b"{}"), GOOD) as service:
        call(service.url, "search", text="a")
        assert service.seen[1] - service.seen[0] >= 1


@pytest.mark.parametrize(("act", "status"), [((503, {}, b'{"detail": "full"}'), 503), ("drop", None)])
def test_patience_ends(call: Call, act: Act, status: int | None) -> None:
    with hostile(act) as service:
        with pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1") as caught:
            call(service.url, "search", text="a", client={"retries": 2})
        assert (caught.value.status, len(service.seen)) == (status, 3)
        with pytest.raises(ServiceUnavailable):
            call(service.url, "search", text="a", client={"retries": 0})
        assert len(service.seen) == 4


def test_nobody_there(call: Call) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # taken, and nobody listens
        with pytest.raises(ServiceUnavailable, match="does not answer"):
            call(f"http://127.0.0.1:{probe.getsockname()[1]}", "search", text="a")


def test_a_timeout_is_told_and_not_repeated(call: Call) -> None:
    with hostile("hang") as service:
        start = time.monotonic()
        with pytest.raises(ServiceUnavailable, match=r"(?i)time"):
            call(service.url, "search", text="a", client={"timeout": 0.3})
        assert time.monotonic() - start < 3
        assert len(service.seen) == 1


BAD_HITS = (b"3", b"[{}]", b'[{"id": Infinity}]', b'[{"id": "x", "score": 0, "metadata": {}}]')


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", *(b'{"hits": %s}' % hits for hits in BAD_HITS)],
)
def test_an_answer_that_is_none_is_an_error_of_ours(call: Call, body: bytes) -> None:
    with hostile((200, {}, body)) as service, pytest.raises(ServiceError, match="no clip-batch service"):
        call(service.url, "search", text="a")


@pytest.mark.parametrize("status", [400, 404, 500])
@pytest.mark.parametrize("body", [b"", b"\x00" * 10_000, b'{"detail": [{"loc": []}]}', b'{"detail": {"a": [1]}}', b"3"])
def test_an_error_without_sense_is_one_line(call: Call, status: int, body: bytes) -> None:
    with hostile((status, {}, body)) as service:
        with pytest.raises(ServiceError, match=str(status)) as caught:
            call(service.url, "search", text="a")
        assert caught.value.status == status
        assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)
        assert len(service.seen) == 1


def test_a_redirect_does_not_carry_the_token_away(call: Call) -> None:
    with hostile(GOOD) as other, hostile((307, {"location": f"{other.url}/v1/search"}, b"")) as service:
        with pytest.raises(ServiceError, match="307"):
            call(service.url, "search", text="a", client={"token": "secret"})
        assert service.tokens == ["Bearer secret"]
        assert other.seen == []


def test_no_more_are_asked_at_once_than_was_said(call: Call) -> None:
    with hostile(GOOD, seconds=0.05) as service:
        call(service.url, "search_many", [f"{i}" for i in range(20)], concurrency=3)
        assert (service.most, len(service.seen)) == (3, 20)


def test_many_end_with_the_first_error(call: Call) -> None:
    with hostile((400, {}, b'{"detail": "no"}')) as service:
        with pytest.raises(ServiceError, match="no"):
            call(service.url, "search_many", [f"{i}" for i in range(1000)], concurrency=2)
        assert len(service.seen) < 20


def test_many_are_asked_only_as_they_are_taken() -> None:
    taken = []

    def queries() -> Iterator[str]:
        for i in range(1000):
            taken.append(i)
            yield str(i)

    with hostile(GOOD) as service, Client(service.url) as client:
        found = client.search_many(queries(), concurrency=2)
        next(found)
        assert len(taken) <= 4
        found.close()  # type: ignore[attr-defined]
        assert len(service.seen) <= 4


# What it waits, and what it loads


@given(st.text())
def test_any_retry_after_is_a_bounded_pause_or_none(said: str) -> None:
    pause = retry_after(said)
    assert pause is None or 0 <= pause <= clients.MAX_PAUSE


def test_retry_after_as_rfc_9110_writes_it() -> None:
    assert retry_after("7") == 7
    assert retry_after("9999999") == clients.MAX_PAUSE
    assert retry_after("Fri, 31 Dec 1999 23:59:59 GMT") == 0
    in_an_hour = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 20))
    assert 15 < (retry_after(in_an_hour) or 0) <= 20
    assert retry_after("soon") is None
    assert retry_after(None) is None


def test_pauses_grow_and_are_not_alike() -> None:
    assert 0.125 <= back_off(0) <= 0.25
    assert 1 <= back_off(3) <= 2
    assert back_off(50) <= clients.MAX_PAUSE
    assert len({back_off(2) for _ in range(10)}) > 1


def test_the_client_loads_no_numpy_nor_torch() -> None:
    code = "import sys, clip_batch; clip_batch.Client('http://localhost:9').close(); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'httpx2'" in done.stdout
    assert not {"'numpy'", "'torch'", "'fastapi'", "'faiss'"} & set(done.stdout.strip("[]\n").split(", "))


def test_its_errors_are_ours() -> None:
    assert issubclass(ServiceUnavailable, ServiceError)
    assert issubclass(ServiceError, ClipBatchError)


def test_hits_are_bound_to_the_version_that_was_searched(service: str) -> None:
    with Client(service) as client:
        hits = client.wait().search("caption 3 of tar 0", k=3)
        assert hits.index_name == "pictures" and re.fullmatch("[0-9a-f]{12}", hits.version) and hits.complete
        assert hits.scanned >= 3 and hits[0].image().startswith(b"\xff\xd8")
        assert hits[0].image() == client.image("pictures", hits[0].id)
        with pytest.raises(ServiceError, match="search again"):
            client.image("pictures", hits[0].id, "0123456789ab")
        assert [hits.version for hits in client.search_many(["a", "b"])] == [hits.version] * 2
