"""Parts of images, conditional requests, the description of the service, and tokens of any characters."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from clip_batch.client import Client
from clip_batch.errors import ConfigError
from tests.servers.serving import make_index, running, served

IMAGE = "/v1/image/index/7"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_index(tmp_path_factory.mktemp("details"))


@pytest.fixture(scope="module")
def client(index: str) -> Iterator[TestClient]:
    with served(index) as client:
        yield client


def test_parts_of_an_image(client: TestClient) -> None:
    whole = client.get(IMAGE)
    data, size, tag = whole.content, len(whole.content), whole.headers["etag"]
    assert whole.headers["accept-ranges"] == "bytes"
    head = client.head(IMAGE)
    assert (head.status_code, head.content, int(head.headers["content-length"])) == (200, b"", size)
    assert {**head.headers} == {**whole.headers}
    for asked, first, last in (
        ("bytes=0-0", 0, 0),
        ("bytes=10-19", 10, 19),
        ("bytes=10-", 10, size - 1),
        ("bytes=-5", size - 5, size - 1),
        (f"bytes=-{size + 5}", 0, size - 1),
        (f"bytes=5-{size + 5}", 5, size - 1),
    ):
        part = client.get(IMAGE, headers={"range": asked})
        assert (part.status_code, part.content) == (206, data[first : last + 1])
        assert part.headers["content-range"] == f"bytes {first}-{last}/{size}"
    for asked in ("bytes=5-4", "bytes=-", "bytes=0-1,3-4", "items=0-1", "bytes=a-b", ""):
        assert client.get(IMAGE, headers={"range": asked}).content == data
    for asked in (f"bytes={size}-", "bytes=-0"):
        beyond = client.get(IMAGE, headers={"range": asked})
        assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}")
    for given, status in ((tag, 206), ('"other"', 200)):
        assert client.get(IMAGE, headers={"range": "bytes=0-1", "if-range": given}).status_code == status
    for given, status in ((tag, 304), (f"W/{tag}", 304), (f'"a", {tag}', 304), ("*", 304), ('"a"', 200), ("", 200)):
        assert client.get(IMAGE, headers={"if-none-match": given}).status_code == status
        assert client.head(IMAGE, headers={"if-none-match": given}).status_code == status
    assert client.head("/v1/image/index/100000").status_code == 404


def test_the_description(client: TestClient, index: str) -> None:
    with served(index, token="secret") as guarded:
        schema = guarded.get("/openapi.json", headers={"authorization": "Bearer secret"}).json()
    names = [operation["operationId"] for path in schema["paths"].values() for operation in path.values()]
    assert len(set(names)) == len(names) and {"post_v1_search", "get_v1_image_index_row"} <= set(names)
    assert set(schema["components"]["securitySchemes"]) == {"bearer", "cookie"}
    assert schema["security"] == [{"bearer": []}, {"cookie": []}]
    assert schema["paths"]["/healthz"]["get"]["security"] == [{}]
    plain = client.get("/openapi.json").json()
    assert plain["security"] == [{}]
    for path, operations in plain["paths"].items():
        if "requestBody" in operations.get("post", {}):
            example = operations["post"]["requestBody"]["content"]["application/json"]["example"]
            assert client.post(
                path, json={**example, "indice_name": "index"} if path == "/knn-service" else example
            ).is_success


TOKENS = ["a;b, c=d", "ß 犬 🔑", 'q"uo\\te', "100%25", "a+b/c==", "  spaces  ", "%", '"']


@pytest.mark.parametrize("token", TOKENS)
def test_tokens(index: str, token: str) -> None:
    with served(index, token=token) as client:
        for value in (token.encode(), token.strip().encode()):
            assert client.get("/indices-list", headers={"authorization": b"Bearer " + value}).status_code == 200
        cookie = f"a=b; clip_batch_token={quote(token, safe='')}; c=d"
        assert client.get("/indices-list", headers={"cookie": cookie}).status_code == (
            200 if token == token.strip() else 401
        )
        for wrong in (token[:-2] + "x", token + "x", "", "%00", "?", "??????"):
            assert client.get("/indices-list", headers={"authorization": f"Bearer {wrong}".encode()}).status_code == 401
            assert (
                client.get("/indices-list", headers={"cookie": f"clip_batch_token={quote(wrong)}"}).status_code == 401
            )


@pytest.mark.slow
def test_a_client_with_any_token(index: str) -> None:
    with running({"index": index}, token=TOKENS[1]) as url, Client(url, token=TOKENS[1]) as client:
        assert client.indices()[0]["name"] == "index"
    with pytest.raises(ConfigError, match="control characters"):
        Client("http://localhost", token="a\nb")
