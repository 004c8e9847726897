"""Tokens, limits, rates and images by URL; and fuzzers, which must find no request that is answered 500."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_batch.serve.http import limits, requests
from clip_batch.serve.http.limits import Rate
from tests.corpus import bomb
from tests.servers.image_server import image_server
from tests.servers.serving import make_index, running, served


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_index(tmp_path_factory.mktemp("limits"))


@pytest.fixture(scope="module")
def client(index: str) -> Iterator[TestClient]:
    with served(index, max_body="100KB", max_k=100, max_queries=3) as client:
        yield client


def test_a_token_is_needed_for_all_but_the_page_and_health(index: str) -> None:
    with served(index, token="a secret") as client:
        for path in ("/", "/healthz", "/readyz"):
            assert client.get(path).status_code != 401
        for path in ("/indices-list", "/v1/indices", "/v1/image/index/0", "/metrics", "/openapi.json", "/nowhere"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        for value in ("Bearer wrong", "Bearer", "Basic a secret", "a secret", "Bearer a secretx"):
            assert client.get("/indices-list", headers={"authorization": value}).status_code == 401
        for headers in ({"authorization": "Bearer a secret"}, {"authorization": "bearer a secret"}):
            assert client.get("/indices-list", headers=headers).status_code == 200
        for cookie, status in [('clip_batch_token="a secret"', 200), ("clip_batch_token=x", 401), ("a=\x01;;=", 401)]:
            assert client.get("/indices-list", headers={"cookie": cookie}).status_code == status


def test_origins(index: str) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with served(index, cors=["https://a.example"], token="t") as client:
        assert client.options("/knn-service", headers=asked).headers["access-control-allow-origin"] == asked["origin"]
        refused = client.post("/knn-service", headers={"origin": asked["origin"]})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == asked["origin"]
        other = {**asked, "origin": "https://b.example"}
        assert "access-control-allow-origin" not in client.options("/knn-service", headers=other).headers
    with served(index) as client:
        assert "access-control-allow-origin" not in client.options("/knn-service", headers=asked).headers


def test_bodies(client: TestClient) -> None:
    assert client.post("/v1/search", json={"text": "a" * 9_000}).status_code == 200
    assert client.post("/v1/search", json={"image": "a" * 100_000}).status_code == 413

    def pieces() -> Iterator[bytes]:  # without a length
        for _ in range(200):
            yield b" " * 1000

    assert client.post("/v1/search", content=pieces()).status_code == 413
    large = {"embedding": [0.123456789] * 7000}  # parsed in a thread
    answer = client.post("/v1/search", json=large)
    assert (answer.status_code, answer.json()["field"]) == (400, "embedding")


def test_a_body_that_does_not_arrive(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "READ_SECONDS", 0.05)
    sent: list[Any] = []

    async def ask() -> None:
        async def receive() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/search", "headers": [], "query_string": b""}
        await client.app({**scope, "client": ("1.1.1.1", 1), "scheme": "http", "server": ("a", 80)}, receive, send)

    asyncio.run(ask())
    assert sent[0]["status"] == 408


def test_too_many_pixels(client: TestClient) -> None:
    answer = client.post("/v1/search", json={"image": base64.b64encode(bomb(12_000)).decode()})
    assert answer.status_code == 400, answer.text
    assert "pixels" in answer.json()["detail"]


def test_a_rate_per_client(index: str) -> None:
    with served(index, rate=0.001, rate_burst=3) as client:
        answers = [client.get("/indices-list") for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200


def test_buckets_fill_again_and_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    rate = Rate(2, 4, clock=lambda: now[0])
    assert [rate.wait("a") for _ in range(5)] == [0, 0, 0, 0, 0.5]
    now[0] = 0.5
    assert [rate.wait("a"), rate.wait("b")] == [0, 0]
    assert rate.wait("a") == 0.5
    monkeypatch.setattr(limits, "CLIENTS", 10)
    for number in range(50):
        rate.wait(str(number))
    assert len(rate._buckets) == 10
    assert rate.wait("a") == 0


@pytest.fixture(scope="module")
def images() -> Iterator[str]:
    with image_server() as url:
        yield url


def test_an_image_by_its_url(index: str, images: str) -> None:
    with served(index, image_url=True, image_url_private=True) as client:
        for path in ("/image", "/moved"):
            (hit,) = client.post("/v1/search", json={"image_url": images + path, "k": 1}).json()["hits"]
            assert (hit["metadata"]["seed"], hit["metadata"]["number"]) == (1, 7)
        asked = {"image_url": f"{images}/image", "num_images": 1, "modality": "image", "indice_name": "index"}
        assert client.post("/knn-service", json=asked).json()[0]["number"] == 7
        assert "download_time_count 3.0" in client.get("/metrics").text
    with served(index, image_url=True) as client:
        answer = client.post("/v1/search", json={"image_url": f"{images}/image"})
        assert (answer.status_code, answer.json()["field"]) == (400, "image_url")
        assert "not a public address" in answer.json()["detail"]
        answer = client.post("/v1/search", json={"image_url": "file:///etc/passwd"})
        assert (answer.status_code, answer.json()["field"]) == (400, "image_url")


def test_no_image_is_fetched_from_a_special_address(index: str) -> None:
    special = ("192.0.0.192", "169.254.169.254", "127.0.0.1", "2130706433", "0x7f.1", "0", "100.100.100.200")
    wrapped = ("::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::7f00:1")
    with served(index, image_url=True, fetch_timeout=2.0) as client:
        for host in (
            *special,
            "localhost",
            *(f"[{address}]" for address in (*wrapped, "2002:7f00:1::", "fd00:ec2::254")),
        ):
            answer = client.post("/v1/search", json={"image_url": f"http://{host}:9/image"})
            assert (answer.status_code, answer.json()["field"]) == (400, "image_url")
            assert "not a public address" in answer.json()["detail"], (host, answer.text)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_request_of_the_schema_makes_a_500(index: str) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    seen: dict[tuple[str, int], int] = {}
    with running({"index": index}, "--max-body", "100KB", "--max-k", "100") as url:
        for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
            operation = result.ok()
            modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
            valid, invalid = (operation.as_strategy(generation_mode=mode) for mode in modes)

            @settings(max_examples=200, suppress_health_check=list(HealthCheck), database=None)  # few are valid
            @given(case=valid | invalid)
            def ask(case: Any) -> None:
                answer = case.call()
                key = (case.path, answer.status_code)
                seen[key] = seen.get(key, 0) + 1
                checks = [schemathesis.checks.not_a_server_error, schemathesis.checks.response_schema_conformance]
                case.validate_response(answer, checks=checks)

            ask()
    assert not [key for key in seen if key[1] >= 500]
    assert {"/v1/search", "/v1/embed", "/knn-service", "/metadata"} <= {path for path, status in seen if status == 422}
    assert {"/v1/embed", "/metrics", "/indices-list"} <= {path for path, status in seen if status == 200}


words = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.lists(st.floats(), max_size=8)
)
NAMES = """text image image_url embedding id queries index modality k threshold effort filters columns deduplicate
safety aesthetic texts images embedding_input num_images num_result_ids indice_name ids aesthetic_score"""
names = st.sampled_from(NAMES.split())
bodies = st.dictionaries(
    names,
    st.recursive(words, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3)),
    max_size=4,
)


@settings(max_examples=300)
@given(st.sampled_from(["/v1/search", "/v1/embed", "/knn-service", "/metadata"]), bodies)
def test_no_body_makes_a_500(client: TestClient, path: str, body: Any) -> None:
    answer = client.post(path, content=json.dumps(body).encode())
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["detail"]


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_no_bytes_make_a_500(client: TestClient, body: bytes) -> None:
    assert client.post("/v1/search", content=body).status_code == 422


def test_a_strange_host(index: str) -> None:
    asked = {"text": "a", "num_images": 1, "modality": "image", "indice_name": "index"}
    for host, base in [
        ("a.example:99", "http://a.example:99/"),
        ("[", "/"),
        ("a/b@c", "/"),
        ("[::1]:8", "http://[::1]:8/"),
    ]:
        with served(index, allowed_hosts=["*"]) as client:
            hit = client.post("/knn-service", json=asked, headers={"host": host}).json()[0]
            assert hit["url"].startswith(f"{base}v1/image/index/")


def test_no_path_of_the_data_is_opened(client: TestClient, tmp_path: Path) -> None:
    """What a row's metadata can name is the planner's shard and a range in it; a request names neither."""
    paths = client.get("/openapi.json").json()["paths"]
    fields = json.dumps(client.get("/openapi.json").json()["components"]["schemas"]["SearchRequest"])
    assert not any(word in fields for word in ('"path"', '"file"', '"shard"'))
    assert "/v1/image/{index}/{row}" in paths
