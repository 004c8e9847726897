"""Lanes, the text cache and threads: queries that arrive together are encoded together, and limits hold."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.config import ServeConfig
from clip_batch.encoders.families.fake import FakeEncoder
from clip_batch.serve.http.errors import Busy
from clip_batch.serve.search.batching import Lane, TextCache
from clip_batch.serve.search.encodings import Encoding
from clip_batch.serve.search.metrics import Metrics
from clip_batch.serve.search.threads import Threads
from tests.servers.serving import make_index, served


class Recorder:
    """Encodes a number as itself, one batch at a time, and records the batches; -1 cannot be encoded."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[int]] = []
        self.seconds = seconds

    def __call__(self, items: list[int]) -> Any:
        self.batches.append(items)
        time.sleep(self.seconds)
        if -1 in items:
            raise ValueError("minus one")
        return np.array(items, np.float32)[:, None]


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 1000), max_size=9), max_size=12), st.integers(1, 8))
def test_each_gets_its_own_vector_in_bounded_batches(requests: list[list[int]], most: int) -> None:
    encode = Recorder()
    lane = Lane(encode, most, 0.001, 1000)

    async def run() -> Any:
        return await asyncio.gather(*(lane.submit(items) for items in requests))

    answers = asyncio.run(run())
    lane.close()
    assert [[int(vector[0]) for vector in answer] for answer in answers] == requests
    assert [item for batch in encode.batches for item in batch] == [item for items in requests for item in items]
    assert all(0 < len(batch) <= most for batch in encode.batches)


def test_what_arrives_meanwhile_is_the_next_batch() -> None:
    encode = Recorder(0.05)
    lane = Lane(encode, 32, 0, 1000)

    async def run() -> None:
        first = asyncio.create_task(lane.submit([0]))
        await asyncio.sleep(0.01)
        await asyncio.gather(first, *(lane.submit([number]) for number in range(1, 11)))

    asyncio.run(run())
    assert encode.batches == [[0], list(range(1, 11))]


def test_a_query_that_cannot_be_encoded_fails_alone() -> None:
    lane = Lane(Recorder(), 8, 0.01, 100)

    async def run() -> list[Any]:
        return await asyncio.gather(*(lane.submit([item]) for item in (1, -1, 2)), return_exceptions=True)

    one, error, two = asyncio.run(run())
    assert (float(one[0][0]), float(two[0][0])) == (1, 2)
    assert isinstance(error, ValueError)


def test_a_request_that_went_away_is_not_encoded() -> None:
    encode = Recorder()
    lane = Lane(encode, 8, 0.02, 100)

    async def run() -> None:
        gone = asyncio.create_task(lane.submit([7]))
        stays = asyncio.create_task(lane.submit([8]))
        await asyncio.sleep(0)
        gone.cancel()
        assert float((await stays)[0][0]) == 8

    asyncio.run(run())
    assert encode.batches == [[8]]


def test_a_full_lane_is_busy() -> None:
    lane = Lane(Recorder(0.05), 2, 0, 4)

    async def run() -> list[Any]:
        return await asyncio.gather(*(lane.submit([number]) for number in range(9)), return_exceptions=True)

    answers = asyncio.run(run())
    assert [isinstance(answer, Busy) for answer in answers] == [False] * 4 + [True] * 5


def test_the_cache_keeps_what_was_asked_last_within_its_bytes() -> None:
    cache = TextCache(3 * (4 + 16 + 300))
    vectors = {name: np.full(4, ord(name), np.float32) for name in "abcd"}
    for name in "abc":
        cache.put(name, vectors[name])
    assert cache.get("a") is vectors["a"]
    cache.put("d", vectors["d"])
    assert [name for name in "abcd" if cache.get(name) is not None] == ["a", "c", "d"]
    cache.put("x" * 10_000, vectors["a"])
    assert cache.get("x" * 10_000) is None


def test_a_text_is_encoded_once() -> None:
    metrics = Metrics()
    encoding = Encoding(FakeEncoder(4), ServeConfig(), metrics)

    async def run() -> None:
        first = await encoding.text("a cat")
        assert await encoding.text("a cat") is first

    asyncio.run(run())
    encoding.close()
    text = metrics.text().decode()
    assert 'clip_batch_text_cache_total{result="hit"} 1.0' in text
    assert "text_clip_inference_time_count 1.0" in text


def test_threads_are_bounded() -> None:
    threads, gate = Threads("search", 1, 2), threading.Event()

    async def run() -> None:
        held = [asyncio.create_task(threads.run(gate.wait, 10)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="wait for search"):
            await threads.run(gate.wait)
        gate.set()
        assert await asyncio.gather(*held) == [True, True]
        assert await threads.run(int, "3") == 3

    asyncio.run(run())
    threads.close()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_index(tmp_path_factory.mktemp("batching"))


@pytest.fixture
def slow(index: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    encode = FakeEncoder.encode_texts
    monkeypatch.setattr(FakeEncoder, "encode_texts", lambda *given: (time.sleep(0.1), encode(*given))[1])
    with served(index, max_pending=6, query_batch=4, text_cache="0") as client:
        client.post("/v1/embed", json={"texts": ["warm"]})
        yield client


def test_requests_share_batches_and_too_many_are_told_to_come_again(slow: TestClient) -> None:
    def ask(number: int) -> Any:
        return slow.post("/v1/search", json={"text": f"word {number}", "k": 1})

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    codes = sorted(answer.status_code for answer in answers)
    assert set(codes) == {200, 503}
    assert codes.count(200) >= 6
    assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 503)
    alone = [slow.post("/v1/search", json={"text": f"word {number}", "k": 1}).json() for number in range(20)]
    for answer, right in zip(answers, alone, strict=True):
        assert answer.status_code == 503 or answer.json()["hits"] == right["hits"]
    sizes = [
        line for line in slow.get("/metrics").text.splitlines() if 'batch_queries_bucket{lane="text",le="1.0"}' in line
    ]
    batches = [line for line in slow.get("/metrics").text.splitlines() if 'batch_queries_count{lane="text"}' in line]
    assert float(sizes[0].split()[-1]) < float(batches[0].split()[-1])  # some held more than one


def test_health_is_answered_while_the_encoder_is_at_work(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, inside, gate = FakeEncoder.encode_texts, threading.Event(), threading.Event()

    def held(self: FakeEncoder, texts: Any) -> Any:
        if "held" in texts:
            inside.set()
            assert gate.wait(20)
        return encode(self, texts)

    monkeypatch.setattr(FakeEncoder, "encode_texts", held)
    with served(index) as client, ThreadPoolExecutor(1) as pool:
        work = pool.submit(client.post, "/v1/search", json={"text": "held"})
        assert inside.wait(20)
        assert client.get("/healthz").status_code == 200
        assert client.post("/v1/search", json={"id": 3}).status_code == 200
        assert not work.done()
        gate.set()
        assert work.result().status_code == 200
