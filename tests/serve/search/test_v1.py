"""The /v1 endpoints: mixtures, filters, heads, near duplicates, embeddings and images."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from clip_batch.search.conditions import In
from clip_batch.search.filters import Filter
from tests.corpus import jpeg
from tests.servers.serving import ROWS, make_index, served


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_index(tmp_path_factory.mktemp("v1"))


@pytest.fixture(scope="module")
def client(index: str) -> Iterator[TestClient]:
    with served(index, max_k=1000, max_queries=4) as client:
        yield client


def search(client: TestClient, **fields: Any) -> Any:
    answer = client.post("/v1/search", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids(result: Any) -> list[int]:
    return [hit["id"] for hit in result["hits"]]


def vector(client: TestClient, text: str) -> Any:
    return np.array(client.post("/v1/embed", json={"texts": [text]}).json()["texts"][0])


def test_every_kind_of_query_finds_its_row(client: TestClient) -> None:
    data = jpeg(1_000_003 + 7)
    (hit,) = search(client, image=base64.b64encode(data).decode(), k=1)["hits"]
    assert (hit["metadata"]["seed"], hit["metadata"]["number"]) == (1, 7)
    embedded = client.post("/v1/embed", json={"images": [base64.b64encode(data).decode()]}).json()["images"][0]
    assert ids(search(client, embedding=embedded, k=1)) == [hit["id"]]
    assert ids(search(client, embedding=[5 * value for value in embedded], k=1)) == [hit["id"]]
    assert ids(search(client, id=hit["id"], k=1)) == [hit["id"]]
    (named,) = search(client, text="caption 7 of tar 1", modality="text", k=1)["hits"]
    assert named["metadata"]["caption"] == "caption 7 of tar 1"
    assert client.get(named["image"]).content == data


def test_a_mixture_is_the_weighted_sum_of_unit_vectors(client: TestClient) -> None:
    mixed = vector(client, "red") + 2 * vector(client, "caption") - 0.5 * vector(client, "tar")
    queries = [{"text": "red"}, {"text": "caption", "weight": 2}, {"text": "tar", "weight": -0.5}]
    result = search(client, queries=queries, k=7)
    assert ids(result) == ids(search(client, embedding=mixed.tolist(), k=7))
    whole = [{"queries": [{"text": "red"}, {"text": "red", "weight": -1}]}, {"queries": [{"text": "red", "weight": 0}]}]
    for body in whole:
        answer = client.post("/v1/search", json=body)
        assert (answer.status_code, answer.json()["field"]) == (400, "queries")


def test_threshold_and_k(client: TestClient) -> None:
    every = search(client, text="a", k=1000)
    assert len(every["hits"]) == ROWS
    assert every["complete"]
    middle = every["hits"][20]["score"]
    assert ids(search(client, text="a", k=1000, threshold=middle)) == ids(every)[:21]
    assert ids(search(client, text="a", k=5, threshold=middle)) == ids(every)[:5]


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ({"column": "number", "equals": 3}, lambda row: row["number"] == 3),
        ({"column": "number", "in": [3, 5, 1000]}, lambda row: row["number"] in (3, 5)),
        ({"column": "number", "min": 4, "max": 9.5}, lambda row: 4 <= row["number"] <= 9.5),
        ({"column": "number", "min": 27}, lambda row: row["number"] >= 27),
        ({"column": "caption", "contains": "N 2 OF"}, lambda row: "n 2 of" in (row["caption"] or "")),
        ({"column": "caption", "max": "caption 2"}, lambda row: row["caption"] and row["caption"] <= "caption 2"),
        ({"column": "number", "equals": "3"}, lambda row: False),
        ({"column": "number", "equals": True}, lambda row: False),
    ],
)
@pytest.mark.parametrize("how", ["exact", "selected", "hits"])
def test_filters(
    client: TestClient, condition: dict[str, Any], holds: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_batch.search.searcher.EXACT", 10_000 if how == "exact" else -1)
    service = client.app.state.service  # type: ignore[attr-defined]
    config = dataclasses.replace(service.config, prefilter_rows=0 if how == "hits" else ROWS)
    monkeypatch.setattr(service, "config", config)
    every = search(client, text="a", k=1000)["hits"]
    right = [hit["id"] for hit in every if holds(hit["metadata"])]
    result = search(client, text="a", k=1000, filters=[condition])
    assert ids(result) == right
    assert result["complete"]
    assert ids(search(client, text="a", k=1, filters=[condition])) == right[:1]


def test_all_filters_hold_and_the_bound_is_told(index: str) -> None:
    last = {"column": "caption", "contains": "tar 1"}
    with served(index) as client:
        both = search(client, text="a", k=60, filters=[last, {"column": "number", "max": 3}])
        assert {hit["metadata"]["number"] for hit in both["hits"]} == {0, 1, 2, 3}
        rare = search(client, text="a", k=1000)["hits"][-1]["metadata"]["key"]
    with served(index, max_scan=10, prefilter_rows=ROWS - 1) as client:
        result = search(client, text="a", k=2, filters=[{"column": "key", "equals": rare}])
        assert (result["hits"], result["scanned"], result["complete"]) == ([], 10, False)
    with served(index, max_scan=10) as client:
        result = search(client, text="a", k=2, filters=[{"column": "key", "equals": rare}])
        assert ([hit["metadata"]["key"] for hit in result["hits"]], result["complete"]) == ([rare], True)
        again = search(client, text="a", k=2, deduplicate=True, filters=[{"column": "key", "equals": rare}])
        assert ids(again) == ids(result)


def test_columns(client: TestClient, index: str) -> None:
    (hit,) = search(client, text="a", k=1, columns=["number", "key"])["hits"]
    assert list(hit["metadata"]) == ["number", "key"]
    assert hit["image"]
    with served(index, columns=["caption"]) as other:
        (hit,) = search(other, text="a", k=1)["hits"]
        assert list(hit["metadata"]) == ["caption"]
        answer = other.post("/v1/search", json={"text": "a", "columns": ["shard"]})
        assert (answer.status_code, answer.json()["field"]) == (400, "columns.0")


def test_deduplicate_looks_deeper_until_there_are_k(client: TestClient) -> None:
    every = ids(search(client, text="a", k=1000))
    single = ids(search(client, text="a", k=1000, deduplicate=True, deduplicate_threshold=0.6))
    assert len(single) < len(every)
    assert single == [id for id in every if id in single]
    assert ids(search(client, text="a", k=5, deduplicate=True, deduplicate_threshold=0.6)) == single[:5]


def test_heads(index: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    safety, violence, beauty = rng.standard_normal((3, 8)).astype(np.float32)
    np.savez(tmp_path / "safety.npz", weight=safety[None], bias=np.zeros(1, np.float32))
    np.save(tmp_path / "violence.npy", np.stack([-violence, violence]))
    np.save(tmp_path / "beauty.npy", beauty[None])
    digest = hashlib.sha256((tmp_path / "beauty.npy").read_bytes()).hexdigest()
    heads = {
        name: str(tmp_path / file) for name, file in (("safety_head", "safety.npz"), ("violence_head", "violence.npy"))
    }
    with served(index, aesthetic_head=f"{tmp_path}/beauty.npy#sha256={digest}", **heads) as client:
        assert client.get("/v1/indices").json()["features"]["safety"] is True
        service = client.app.state.service  # type: ignore[attr-defined]
        every = search(client, text="a", k=60)["hits"]
        with service.indices.use(None) as (_, version):
            vectors = version.searcher.reconstruct([hit["id"] for hit in every])
        order = [hit["id"] for hit in every]
        assert ids(search(client, text="a", k=60, safety=True)) == [
            id for id, vector in zip(order, vectors, strict=True) if vector @ safety <= 0
        ]
        assert (
            ids(search(client, text="a", k=3, violence=True))
            == [id for id, vector in zip(order, vectors, strict=True) if vector @ violence <= 0][:3]
        )
        scores = np.array([hit["score"] for hit in every]) + 2 * vectors @ beauty
        result = search(client, text="a", k=60, aesthetic=2)
        assert ids(result) == [order[place] for place in np.argsort(-scores, kind="stable")]
        assert result["hits"][0]["aesthetic"] == pytest.approx(float((vectors @ beauty)[np.argmax(scores)]), abs=1e-5)


def test_embed(client: TestClient) -> None:
    picture = base64.b64encode(jpeg(3)).decode()
    result = client.post("/v1/embed", json={"texts": ["a", "b", "a"], "images": [picture]}).json()
    assert result["dim"] == 8
    assert result["texts"][0] == result["texts"][2] != result["texts"][1]
    assert [len(vector) for vector in result["images"]] == [8]
    assert np.linalg.norm(result["images"][0]) == pytest.approx(1, abs=1e-5)


def test_what_is_served(client: TestClient) -> None:
    result = client.get("/v1/indices").json()
    (index,) = result["indices"]
    assert (index["name"], index["rows"], index["modalities"]) == ("index", ROWS, ["image", "text"])
    assert {"caption", "number"} <= set(index["columns"])
    assert result["features"] == {
        "deduplicate": True, "safety": False, "violence": False, "aesthetic": False, "image_url": False
    }  # fmt: skip


def test_images(client: TestClient) -> None:
    for hit in search(client, text="a", k=ROWS)["hits"]:
        answer = client.get(hit["image"])
        assert answer.content == jpeg(hit["metadata"]["seed"] * 1_000_003 + hit["metadata"]["number"])
        assert answer.headers["content-type"] == "image/jpeg"
        assert answer.headers["x-content-type-options"] == "nosniff"
    again = client.get(hit["image"], headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for path, status in [(f"index/{ROWS}", 404), ("index/-1", 404), ("other/0", 404), ("index/0?version=x", 404)]:
        assert client.get(f"/v1/image/{path}").status_code == status
    assert client.get("/v1/image/index/..%2F..%2Fetc%2Fpasswd").status_code in (404, 422)


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 422, None),
        ({"text": "a", "id": 3}, 422, None),
        ({"text": ""}, 422, "text"),
        ({"image": ""}, 422, "image"),
        ({"queries": [{"text": ""}]}, 422, "queries.0.text"),
        ({"text": "a", "queries": [{"text": "b"}]}, 422, None),
        ({"queries": []}, 422, "queries"),
        ({"queries": [{"text": "a"}, {}]}, 422, "queries.1"),
        ({"queries": [{"text": "a", "weight": "x"}]}, 422, "queries.0.weight"),
        ({"queries": [{"text": "a"}] * 5}, 422, "queries"),
        ({"queries": [{"text": "a"}, {"embedding": [1.0]}]}, 400, "queries.1.embedding"),
        ({"queries": [{"id": 10**6}]}, 404, "queries.0.id"),
        ({"embedding": [0.0] * 8}, 400, "embedding"),
        ({"embedding": ["1"] * 8}, 422, "embedding.0"),
        ({"image": "aGVsbG8="}, 400, "image"),
        ({"image": "ä"}, 422, "image"),
        ({"image_url": "http://127.0.0.1/a.jpg"}, 400, "image_url"),
        ({"text": "a", "k": 1001}, 422, "k"),
        ({"text": "a", "k": "10"}, 422, "k"),
        ({"text": "a", "nonsense": 1}, 422, "nonsense"),
        ({"text": "a", "index": "other"}, 404, "index"),
        ({"text": "a", "effort": 0}, 422, "effort"),
        ({"text": "a", "safety": True}, 400, "safety"),
        ({"text": "a", "violence": True}, 400, "violence"),
        ({"text": "a", "aesthetic": 1}, 400, "aesthetic"),
        ({"text": "a", "filters": [{"column": "x", "equals": 1}]}, 400, "filters.0.column"),
        ({"text": "a", "filters": [{"column": "key"}]}, 422, "filters.0"),
        ({"text": "a", "filters": [{"column": "key", "equals": 1, "min": 2}]}, 422, "filters.0"),
        ({"text": "a", "columns": ["x"]}, 400, "columns.0"),
        ({"text": "a", "modality": "sound"}, 422, "modality"),
    ],
)
def test_a_bad_request_names_its_field(client: TestClient, body: Any, status: int, field: str | None) -> None:
    answer = client.post("/v1/search", json=body)
    assert (answer.status_code, answer.json()["field"]) == (status, field), answer.text
    assert "\n" not in answer.json()["detail"]


def test_an_unknown_field_of_a_request_is_told_where_the_known_ones_are(client: TestClient) -> None:
    answer = client.post("/v1/search", json={"text": "a", "where": "number = 1"})
    told = "where: a request has no such field; /openapi.json lists those it has"
    assert (answer.status_code, answer.json()) == (422, {"detail": told, "field": "where"})


def test_as_many_vectors_are_compared_as_there_are_rows(index: str) -> None:
    with served(index, max_k=20_000) as client:
        answer = client.post("/v1/search", json={"text": "a", "k": 10_001, "deduplicate": True})
        assert 0 < len(answer.json()["hits"]) <= ROWS


def test_a_filter_in_json() -> None:
    read = Filter.model_validate_json(json.dumps({"column": "a", "in": [1, "x", True]}))
    assert repr(read.condition()) == repr(In("a", (1, "x", True)))


def test_only_what_our_planner_recorded_is_read(client: TestClient) -> None:
    """The shard that a foreign index's metadata names is data, and could name any file of this machine."""
    service = client.app.state.service  # type: ignore[attr-defined]
    with service.indices.use(None) as (_, version):
        ours = version.manifest
        try:
            version.manifest = dataclasses.replace(ours, sources=())
            assert client.get("/v1/image/index/0").status_code == 404
            assert search(client, text="a", k=1)["hits"][0]["image"] is None
        finally:
            version.manifest = ours
    assert client.get("/v1/image/index/0").status_code == 200
