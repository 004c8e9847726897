"""clip-retrieval's endpoints, field by field and with its own client."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from clip_batch.serve.search.app import create_app
from clip_batch.serve.search.metrics import REQUEST, STEPS
from tests import ROOT
from tests.corpus import jpeg
from tests.servers.serving import ROWS, make_index, running, served


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_index(tmp_path_factory.mktemp("wire"))


@pytest.fixture(scope="module")
def client(index: str) -> Iterator[TestClient]:
    with served(index, max_k=200) as client:
        yield client


def knn(client: TestClient, **fields: Any) -> Any:
    body = {"modality": "image", "num_images": 5, "indice_name": "index", **fields}
    answer = client.post("/knn-service", content=json.dumps(body))  # without a content type, as its client does
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_names(client: TestClient) -> None:
    assert client.get("/indices-list").json() == ["index"]


def test_a_text_finds_its_caption(client: TestClient) -> None:
    hits = knn(client, text="caption 3 of tar 1", modality="text", num_images=2, num_result_ids=4)
    assert hits[0]["caption"] == "caption 3 of tar 1"
    assert hits[0]["similarity"] == pytest.approx(1, abs=1e-3)
    assert [set(hit) == {"id", "similarity"} for hit in hits] == [False, False, True, True]
    assert [hit["similarity"] for hit in hits] == sorted((hit["similarity"] for hit in hits), reverse=True)


def test_an_image_finds_itself_and_its_address(client: TestClient) -> None:
    data = jpeg(1_000_003 + 7)
    hit = knn(client, image=base64.b64encode(data).decode(), text=None)[0]
    assert (hit["seed"], hit["number"]) == (1, 7)
    assert client.get(hit["url"]).content == data


def test_an_embedding_is_taken_as_it_is(client: TestClient, index: str) -> None:
    vector = client.post("/v1/embed", json={"texts": ["caption 3 of tar 1"]}).json()["texts"][0]
    once = knn(client, embedding_input=vector, modality="text")
    twice = knn(client, embedding_input=[2 * value for value in vector], modality="text")
    assert [hit["id"] for hit in once] == [hit["id"] for hit in twice]
    assert twice[0]["similarity"] == pytest.approx(2 * once[0]["similarity"], rel=1e-3)


def test_what_its_page_sends(client: TestClient) -> None:
    hits = knn(
        client,
        text="caption 1 of tar 0",
        image=None,
        image_url=None,
        embedding_input=None,
        num_result_ids=60,
        use_mclip=False,
        deduplicate=False,
        use_safety_model=True,
        use_violence_detector=True,
        aesthetic_score="",
        aesthetic_weight="0.5",
    )
    assert len(hits) == ROWS
    assert len({hit["id"] for hit in hits}) == ROWS
    assert sum("key" in hit for hit in hits) == 5
    assert knn(client, text="a", aesthetic_score="9", aesthetic_weight=0.5) == knn(client, text="a")  # no such head


def test_deduplicate_leaves_the_best_of_each_component(client: TestClient, index: str) -> None:
    alone = knn(client, text="caption 1 of tar 0", num_result_ids=60, num_images=0)
    single = knn(client, text="caption 1 of tar 0", num_result_ids=60, num_images=0, deduplicate=True)
    assert 0 < len(single) <= len(alone)
    assert single[0] == alone[0]
    service = client.app.state.service  # type: ignore[attr-defined]
    with service.indices.use(None) as (_, version):
        vectors = version.searcher.reconstruct([hit["id"] for hit in single])
    assert (np.triu(vectors @ vectors.T, 1) < 0.94 + 1e-3).all()


def test_metadata(client: TestClient) -> None:
    rows = client.post("/metadata", json={"ids": [59, 0, 59], "indice_name": "index"}).json()
    assert [row["id"] for row in rows] == [59, 0, 59]
    assert rows[0] == rows[2] != rows[1]
    assert {"key", "caption", "url"} <= set(rows[0]["metadata"])
    assert client.post("/metadata", json={"ids": [], "indice_name": "index"}).json() == []


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("/knn-service", {}, 422, "text"),
        ("/knn-service", {"text": ""}, 422, "text"),
        ("/knn-service", {"text": "a", "indice_name": "other"}, 404, "indice_name"),
        ("/knn-service", {"text": "a", "modality": "sound"}, 422, "modality"),
        ("/knn-service", {"text": "a", "num_images": -1}, 422, "num_images"),
        ("/knn-service", {"text": "a", "num_images": 0}, 422, "num_images"),
        ("/knn-service", {"text": "a", "num_result_ids": 201}, 422, "num_result_ids"),
        ("/knn-service", {"text": "a", "aesthetic_score": 10}, 422, "aesthetic_score"),
        ("/knn-service", {"text": "a", "aesthetic_weight": "much"}, 422, "aesthetic_weight"),
        ("/knn-service", {"image": "!"}, 422, "image"),
        ("/knn-service", {"image": "aGVsbG8="}, 400, "image"),
        ("/knn-service", {"image_url": "http://127.0.0.1/"}, 400, "image_url"),
        ("/knn-service", {"embedding_input": [1.0]}, 400, "embedding_input"),
        ("/knn-service", {"embedding_input": [1e39] * 8}, 400, "embedding_input"),
        ("/metadata", {}, 422, "ids"),
        ("/metadata", {"ids": [ROWS]}, 404, "ids"),
        ("/metadata", {"ids": [-1]}, 404, "ids"),
        ("/metadata", {"ids": [10**30]}, 404, "ids"),
        ("/metadata", {"ids": [0] * 201}, 422, "ids"),
    ],
)
def test_a_bad_request_names_its_field(client: TestClient, path: str, body: Any, status: int, field: str) -> None:
    answer = client.post(path, json=body)
    assert (answer.status_code, answer.json()["field"]) == (status, field), answer.text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b"\xff", b'{"text": NaN}', b"[" * 100_000])
def test_what_is_no_json_object(client: TestClient, body: bytes) -> None:
    assert client.post("/knn-service", content=body).status_code == 422


def test_columns_and_the_image_itself(index: str) -> None:
    with served(index, columns=["caption", "image"]) as client:
        hit = knn(client, text="caption 3 of tar 1", modality="text")[0]
        assert set(hit) == {"caption", "image", "url", "id", "similarity"}
        assert base64.b64decode(hit["image"]) == jpeg(1_000_003 + 3)


def test_ratings_move_the_query(index: str, tmp_path: Path) -> None:
    ratings = np.random.default_rng(3).standard_normal((10, 8)).astype(np.float32)
    np.save(tmp_path / "ratings.npy", ratings)
    with served(index, aesthetic_head=str(tmp_path / "ratings.npy")) as client:
        plain = np.array(client.post("/v1/embed", json={"texts": ["a"]}).json()["texts"][0])
        moved = plain + 0.5 * ratings[9]
        moved /= np.linalg.norm(moved)
        hits = knn(client, text="a", aesthetic_score=9, aesthetic_weight=0.5)
        assert hits == knn(client, embedding_input=moved.tolist())
        assert hits != knn(client, text="a")


def test_metrics_have_its_names(client: TestClient) -> None:
    knn(client, text="a")
    text = client.get("/metrics").text
    for name in (REQUEST, *STEPS):
        assert f"{name}_bucket{{le=" in text
        assert f"\n{name}_sum " in text
    assert "knn_index_time" in client.get("/metrics-summary").text


def test_no_search_yet(index: str) -> None:
    assert "No search" in TestClient(create_app({"index": index})).get("/metrics-summary").text


def interpreter() -> str:
    """Return the Python in whose environment clip-retrieval is installed."""
    here = ROOT / ".clip-retrieval/bin/python"
    python = os.environ.get("CLIP_RETRIEVAL_PYTHON") or (str(here) if here.exists() else "")
    if not python:
        pytest.skip("clip-retrieval is not installed: set CLIP_RETRIEVAL_PYTHON")
    return python


ITS_CLIENT = """
import json, sys
from clip_retrieval.clip_client import ClipClient, Modality
url, picture = sys.argv[1:]
text = ClipClient(url, "index", modality=Modality.TEXT, num_images=3, deduplicate=False)
image = ClipClient(url, "index", num_images=2)
vector = [1.0] + [0.0] * 7
found = [text.query(text="caption 3 of tar 1"), image.query(image=picture), image.query(embedding_input=vector)]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_its_own_client(index: str, tmp_path: Path) -> None:
    python = interpreter()
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(jpeg(1_000_003 + 7))
    with running({"index": index}) as url:
        command = [python, "-c", ITS_CLIENT, f"{url}/knn-service", str(picture)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    by_text, by_image, by_vector = json.loads(done.stdout)
    assert len(by_text) == 3
    assert by_text[0]["caption"] == "caption 3 of tar 1"
    assert by_text[0]["similarity"] == pytest.approx(1, abs=1e-3)
    assert by_text[0]["url"].startswith(url)
    assert (by_image[0]["seed"], by_image[0]["number"]) == (1, 7)
    assert {"id", "similarity", "url", "caption"} <= set(by_vector[0])
    assert sys.executable != python
