"""/v1/facts: what is in an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from clip_batch.serve.search import facts
from tests.corpus import jpeg, write_tar
from tests.servers.serving import index_of, served

ROWS = 60


def fields(i: int) -> dict[str, Any]:
    return {
        "year": 2000 + i % 5,
        "height_m": i / 2,
        "licence": "cc0" if i % 3 else "by",
        "taken": f"2024-0{1 + i % 9}-11T10:00",
        "good": i % 2 == 0,
        "row": "not ours",
        "tags": ["a", "b"],
        "author": None if i % 4 else f"author {i}",
    }


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("facts")
    files = []
    for i in range(ROWS):
        files += [(f"{i:03d}.jpg", jpeg(i)), (f"{i:03d}.json", json.dumps(fields(i)).encode())]
        files += [(f"{i:03d}.txt", f"{'abcdefghij'[i % 10]} thing number {i}".encode())]
    return index_of([write_tar(str(folder / "0.tar"), files)], folder)


@pytest.fixture(scope="module")
def client(index: str) -> Iterator[TestClient]:
    with served(index) as client:
        yield client


def columns(known: Any) -> dict[str, Any]:
    return {column["name"]: column for column in known["columns"]}


def test_each_column_has_its_facts(client: TestClient) -> None:
    known = client.get("/v1/facts/index").json()
    assert (known["rows"], known["looked_at"], known["model"]) == (ROWS, ROWS, "fake:8")
    by_name = columns(known)
    assert not {"shard", "offset", "length", "key", "row", "partition"} & set(by_name)
    assert by_name["year"]["values"] == [{"value": 2000 + i, "count": 12} for i in range(5)]
    height = by_name["height_m"]
    assert (height["kind"], height["min"], height["max"], sum(height["histogram"])) == ("number", 0, 29.5, ROWS)
    assert by_name["licence"]["values"] == [{"value": "cc0", "count": 40}, {"value": "by", "count": 20}]
    assert (by_name["taken"]["kind"], by_name["taken"]["min"]) == ("date", "2024-01-11")
    assert by_name["good"]["values"] == [{"value": False, "count": 30}, {"value": True, "count": 30}]
    assert (by_name["author"]["kind"], by_name["author"]["nulls"], by_name["author"]["values"]) == ("text", 45, [])
    assert by_name["caption"]["kind"] == "text"


def test_what_facts_say_is_what_filters_find(client: TestClient) -> None:
    def count(**condition: Any) -> int:
        body = {"text": "a", "k": ROWS, "filters": [condition]}
        return len(client.post("/v1/search", json=body).json()["hits"])

    for column in client.get("/v1/facts/index").json()["columns"]:
        for value in column["values"]:
            assert count(column=column["name"], **{"in": [value["value"]]}) == value["count"]
        if column["min"] is not None:
            end = column["max"] + "~" if column["kind"] == "date" else column["max"]
            assert count(column=column["name"], min=column["min"], max=end) == ROWS - column["nulls"]


def test_a_sample_and_examples(client: TestClient) -> None:
    known = client.get("/v1/facts/index").json()
    ids = [row["id"] for row in known["sample"]]
    assert len(set(ids)) == len(ids) == facts.SAMPLE
    assert client.get(known["sample"][5]["image"] + "&width=160").status_code == 200
    assert 1 < len(known["examples"]) <= facts.EXAMPLES
    captions = {
        row["metadata"]["caption"] for row in client.post("/v1/search", json={"id": 0, "k": ROWS}).json()["hits"]
    }
    assert set(known["examples"]) <= captions


def test_a_large_index_is_looked_at_in_part(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = facts._spread(1_000_000)
    assert (len(ids), ids[0], ids[-1]) == (facts.LOOKED_AT, 0, 999_999)


def test_only_columns_that_are_shown_and_rows_that_are_there(index: str, tmp_path: Path) -> None:
    with served(index, columns=["licence"]) as client:
        known = client.get("/v1/facts/index").json()
        assert (list(columns(known)), known["examples"]) == (["licence"], [])
        assert set(known["sample"][0]["metadata"]) == {"licence"}
        assert client.get("/v1/facts/other").status_code == 404


@pytest.mark.parametrize(("values", "counts"), [("aab", {"a": 2, "b": 1}), ("abc", {}), ("a", {})])
def test_values_that_repeat_are_listed_in_a_small_column_too(values: str, counts: dict[str, int]) -> None:
    found = facts._column("licence", pa.chunked_array([list(values)]))
    assert found and {one["value"]: one["count"] for one in found["values"]} == counts
