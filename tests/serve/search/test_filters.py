"""Filters at a running service: slow ones end, with their client or in time, and delay no other search."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_batch.config import MergeConfig
from clip_batch.index.merge.merge import merge
from tests.servers.serving import running

pytestmark = pytest.mark.slow

ROWS = 200_000
SECONDS = 3
"""The service's limit for filters."""


def large_index(folder: Path, rows: int = ROWS) -> str:
    """INDEX of rows that clip-retrieval embedded: `image_path` is a row's number, `caption` a text that is no ASCII."""
    vectors = np.random.default_rng(0).standard_normal((rows, 8), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for name in ("img_emb", "metadata"):
        (folder / "out" / name).mkdir(parents=True)
    np.save(folder / "out/img_emb/img_emb_0.npy", vectors.astype(np.float16))
    numbers = pa.array(np.arange(rows)).cast(pa.string())
    captions = pa.array([f"Straße Nummer {number} in Köln" for number in range(rows)])
    table = pa.table({"image_path": numbers, "caption": captions})
    pq.write_table(table, folder / "out/metadata/metadata_0.parquet")
    config = MergeConfig(queries=5, index_key="IVF64,SQ8", made_by=["fake:8"])
    merge(str(folder / "out"), str(folder / "index"), config)
    return str(folder / "index")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    index = large_index(tmp_path_factory.mktemp("filters"))
    with running({"index": index}, "--filter-timeout", str(SECONDS)) as url:
        yield url


def ask(url: str, **body: Any) -> tuple[int, Any, float]:
    """Return status, answer and seconds of a search."""
    request = urllib.request.Request(
        f"{url}/v1/search", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    started = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response), time.monotonic() - started
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), time.monotonic() - started


def slow(mark: str) -> list[dict[str, str]]:
    """Return filters that take longer than the limit; none of them is cached."""
    return [{"column": "caption", "contains": f"ß{mark}{number}"} for number in range(100)]


def test_slow_filters_end_and_delay_no_plain_search(url: str) -> None:
    answers: list[tuple[int, Any, float]] = []
    attackers = [
        threading.Thread(target=lambda mark=str(number): answers.append(ask(url, id=1, filters=slow(mark))))
        for number in range(4)
    ]
    for attacker in attackers:
        attacker.start()
    times = []
    while any(attacker.is_alive() for attacker in attackers):
        status, answer, seconds = ask(url, id=len(times))
        assert (status, len(answer["hits"])) == (200, 10)
        times.append(seconds)
        time.sleep(0.02)
    for status, answer, seconds in answers:  # two at a time
        assert (status, answer["field"]) == (400, "filters"), answer
        assert f"more than {SECONDS} s" in answer["detail"]
        assert seconds < 3 * SECONDS
    assert len(times) > 20 and np.quantile(times, 0.9) < 0.5, times


def test_a_client_that_leaves_takes_its_filters_along(url: str) -> None:
    address = urlsplit(url)
    for number in range(12):  # six times the threads
        body = json.dumps({"id": 1, "filters": slow(f"left{number}")}).encode()
        head = f"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
            connection.sendall(head + body)
            time.sleep(0.05)
    status, answer, seconds = ask(url, id=1, filters=[{"column": "image_path", "equals": "7"}])
    assert (status, [hit["metadata"]["image_path"] for hit in answer["hits"]]) == (200, ["7"])
    assert seconds < SECONDS, "the filters of clients that left are not evaluated"


def test_long_lists(url: str) -> None:
    allowed = [str(2 * number) for number in range(100_000)]
    for seconds in (SECONDS, 1):  # the second time from the cache
        status, answer, took = ask(url, id=1, k=100, filters=[{"column": "image_path", "in": allowed}])
        assert (status, len(answer["hits"]), answer["complete"]) == (200, 100, True)
        assert all(int(hit["metadata"]["image_path"]) % 2 == 0 for hit in answer["hits"])
        assert took < seconds
    status, answer, _ = ask(url, id=1, filters=[{"column": "image_path", "in": ["x"] * 200_001}])
    assert (status, answer["field"]) == (422, "filters.0.in")
    halves = [{"column": "image_path", "in": ["x"] * 100_001}] * 2
    assert ask(url, id=1, filters=halves)[0] == 422
    for wrong in ([None], [[1]], [{}]):
        status, answer, _ = ask(url, id=1, filters=[{"column": "image_path", "in": wrong}])
        assert (status, answer["field"]) == (422, "filters.0.in")
