"""With conditions, near duplicates, heads and mixtures, the shell, Python, filters and /v1 find the same rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from clip_batch import ConfigError, Query, QueryTerm, SearchConfig, Searcher
from clip_batch.cli import main
from clip_batch.search.find import Bounds, best_rows, rows_over
from clip_batch.search.query import QueryError
from tests.servers.serving import ROWS, make_index, served


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_index(tmp_path_factory.mktemp("find"))


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write linear heads for the encoder's 8 dimensions; return their files by the names of their options."""
    folder = tmp_path_factory.mktemp("heads")
    rng = np.random.default_rng(1)
    for name in ("safety", "violence", "aesthetic"):
        np.save(folder / f"{name}.npy", rng.normal(size=(1, 8)).astype(np.float32))
    return {f"{name}_head": str(folder / f"{name}.npy") for name in ("safety", "violence", "aesthetic")}


@pytest.fixture(scope="module")
def client(index: str, heads: dict[str, str]) -> Iterator[TestClient]:
    with served(index, **heads) as client:
        yield client


@pytest.fixture(scope="module")
def searcher(index: str, heads: dict[str, str]) -> Iterator[Searcher]:
    with Searcher(index, config=SearchConfig(**heads)) as opened:
        yield opened


CASES: list[tuple[list[str], dict[str, Any], dict[str, Any]]] = [
    (["--text", "a"], {"text": "a"}, {"text": "a"}),
    (
        ["--text", "a", "--where", "number >= 4 and number <= 9.5 and caption contains 'TAR 1'"],
        {"text": "a", "where": "number >= 4 and number <= 9.5 and caption contains 'TAR 1'"},
        {
            "text": "a",
            "filters": [{"column": "number", "min": 4, "max": 9.5}, {"column": "caption", "contains": "TAR 1"}],
        },
    ),
    (
        ["--text", "a", "--where", 'number in (1, 3, "5")'],
        {"text": "a", "where": [{"column": "number", "in": [1, 3, "5"]}]},
        {"text": "a", "filters": [{"column": "number", "in": [1, 3, "5"]}]},
    ),
    (
        ["--id", "3", "--unique", "--unique-threshold", "0.6"],
        {"id": 3, "unique": True, "unique_threshold": 0.6},
        {"id": 3, "deduplicate": True, "deduplicate_threshold": 0.6},
    ),
    (["--text", "a", "--safe"], {"text": "a", "safe": True}, {"text": "a", "safety": True}),
    (["--text", "a", "--nonviolent"], {"text": "a", "nonviolent": True}, {"text": "a", "violence": True}),
    (["--text", "a", "--aesthetic", "-0.5"], {"text": "a", "aesthetic": -0.5}, {"text": "a", "aesthetic": -0.5}),
    (
        ["--id", "5", "--text", "a dog", "--text", "snow", "--weight", "1", "--weight", "-0.5", "--weight", "2"],
        {"terms": [QueryTerm(text="a dog"), QueryTerm(text="snow", weight=-0.5), QueryTerm(id=5, weight=2)]},
        {"queries": [{"text": "a dog"}, {"text": "snow", "weight": -0.5}, {"id": 5, "weight": 2}]},
    ),
    (
        ["--text", "a", "--modality", "text", "--threshold", "0", "--safe", "--unique", "--where", "number < 20"],
        {"text": "a", "modality": "text", "threshold": 0, "safe": True, "unique": True, "where": "number < 20"},
        {
            "text": "a",
            "modality": "text",
            "threshold": 0,
            "safety": True,
            "deduplicate": True,
            "filters": [{"column": "number", "max": 19}],
        },
    ),
]


@pytest.mark.parametrize("k", [7, ROWS])
@pytest.mark.parametrize(("flags", "fields", "body"), CASES)
def test_shell_python_and_v1_answer_the_same(
    index: str,
    heads: dict[str, str],
    client: TestClient,
    searcher: Searcher,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    k: int,
    flags: list[str],
    fields: dict[str, Any],
    body: dict[str, Any],
) -> None:
    answer = client.post("/v1/search", json={**body, "k": k, "columns": ["number"]})
    assert answer.status_code == 200, answer.text
    wanted = [{name: hit[name] for name in hit if name != "image"} for hit in answer.json()["hits"]]
    assert wanted

    named = [f"--{name.replace('_', '-')}={path}" for name, path in heads.items()]
    given = ["--index", index, "-k", str(k), *flags, *named]
    assert main(["search", *given, "--json", "--columns", "number"]) == 0
    shown = json.loads(capsys.readouterr().out)
    result = searcher.find(Query(**fields, k=k), ["number"])
    assert (result.scanned, result.complete) == (answer.json()["scanned"], answer.json()["complete"])
    python = [{"id": hit.id, "score": hit.score, "metadata": hit.metadata} for hit in result.hits]
    for one, hit in zip(python, result.hits, strict=True):
        if hit.aesthetic is not None:
            one["aesthetic"] = hit.aesthetic
    assert shown == python == wanted

    if "--threshold" not in flags:  # with which a filter takes all rows
        assert main(["filter", *given, "--output", str(tmp_path / "rows"), "--columns", "number"]) == 0
        table = pq.read_table(tmp_path / "rows/rows/00000.parquet")
        assert table.column_names == ["id", "score", "number"]
        assert table["id"].to_pylist() == [hit["id"] for hit in wanted]


def test_every_row_over_a_threshold_meets_what_is_asked(searcher: Searcher) -> None:
    """`rows_over` finds the same rows as a search for as many best rows."""
    for fields in ({"where": "number != 3"}, {"safe": True, "nonviolent": True}, {"unique": True, "safe": True}):
        query = Query(text="a", threshold=0.1, **fields)  # type: ignore[arg-type]
        parts = list(rows_over(searcher, query, searcher.heads))
        ids = np.concatenate([ids for _, ids in parts])
        best = best_rows(searcher, Query(text="a", threshold=0.1, k=ROWS, **fields), searcher.heads)  # type: ignore[arg-type]
        assert ids.tolist() == sorted(best.ids.tolist())
        assert 0 < len(ids) < ROWS
    with pytest.raises(QueryError, match="aesthetic: it orders the k best rows: give k"):
        list(rows_over(searcher, Query(text="a", threshold=0.1, aesthetic=1), searcher.heads))
    with pytest.raises(QueryError, match=r"unique: \d+ rows are over the threshold, and 5 can be compared"):
        list(rows_over(searcher, Query(text="a", threshold=0.1, unique=True), bounds=Bounds(compared=5)))


def test_a_search_of_vectors_takes_a_condition(searcher: Searcher) -> None:
    vectors = searcher.encode_text(["a", "b"])
    right = [[hit.id for hit in hits if hit.metadata["number"] < 7][:5] for hits in searcher.search(vectors, ROWS)]
    some = searcher.search(vectors, 5, where="number < 7")
    assert [[hit.id for hit in hits] for hits in some] == right
    assert searcher.search(vectors[0], 5, where=[{"column": "number", "max": 6}]) == some[:1]


def test_a_text_is_a_query_and_finds_ten(searcher: Searcher) -> None:
    result = searcher.find("a")
    assert [hit.id for hit in result.hits] == [hit.id for hit in searcher.search(searcher.encode_text(["a"]))[0]]
    assert (len(result.hits), result.complete) == (10, True)


def test_no_columns_are_hits_without_metadata(searcher: Searcher) -> None:
    assert [hit.metadata for hit in searcher.find(Query(text="a", k=3), columns=[]).hits] == [{}, {}, {}]


def test_texts_columns_and_effort_of_the_wrong_type_are_refused(searcher: Searcher) -> None:
    with pytest.raises(ConfigError, match="texts is 'a dog': it must be a list of texts"):
        searcher.encode_text("a dog")
    assert searcher.encode_text([]).shape == (0, searcher.manifest.dim)
    with pytest.raises(ConfigError, match="columns is 'caption': it must be a list of names"):
        searcher.find("a", columns="caption")
    with pytest.raises(ConfigError, match="effort is '5': it must be 1 or more"):
        searcher.search(searcher.encode_text(["a"]), effort="5")  # type: ignore[arg-type]


def test_what_bounds_leave_is_told(searcher: Searcher) -> None:
    rare = Query(text="a", where=f'key = "{searcher.find(Query(text="a", k=ROWS)).hits[-1].metadata["key"]}"')
    left = best_rows(searcher, rare, bounds=Bounds(prefilter_rows=0, scan=12))
    assert (left.ids.tolist(), left.scanned, left.complete) == ([], 12, False)
    for bounds in (Bounds(prefilter_rows=0), Bounds()):
        found = best_rows(searcher, rare, bounds=bounds)
        assert (len(found.ids), found.complete) == (1, True)


def test_conditions_see_nulls_and_all_kinds(searcher: Searcher) -> None:
    """Every fifth row has no caption; a condition and `not` of it leave those out."""

    def count(where: str) -> int:
        return len(searcher.find(Query(text="a", k=ROWS, where=where), ["number"]).hits)

    assert count("caption is null") == ROWS // 5
    assert count("caption is not null") == ROWS - ROWS // 5
    assert count('caption contains "tar 0"') + count('not caption contains "tar 0"') == ROWS - ROWS // 5
    assert count('number = "3"') == count('number != "3"') == 0
    assert count("number = 3 or not caption is null and seed = 1") == 1 + ROWS // 2 - ROWS // 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "a", "where": "nowhere = 1"}, "no metadata column nowhere: there are"),
        ({"text": "a", "where": "number ="}, "where, at its end: expected a value"),
        ({"text": "a", "modality": "sound"}, "modality: sound is not in this index; it has image, text"),
        ({"id": ROWS}, f"ids are whole numbers from 0 to {ROWS - 1}"),
        ({"embedding": [1, 2]}, "embedding: it has 2 numbers, this index has 8"),
        ({"embedding": "abc"}, "embedding: it is not a list of numbers"),
        ({"embedding": [[1], [1, 2]]}, "embedding: it is not a list of numbers"),
        ({"embedding": [0.0] * 8}, "embedding: it gives a vector of length 0"),
        ({"terms": [QueryTerm(text="a"), QueryTerm(text="a", weight=-1)]}, "queries: it gives a vector of length 0"),
    ],
)
def test_a_query_that_cannot_be_answered(searcher: Searcher, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        searcher.find(Query(**fields))


def test_more_hits_than_can_be_compared_are_refused_unless_the_rows_are_fewer(searcher: Searcher) -> None:
    query = Query(text="a", unique=True, k=10**9)
    with pytest.raises(ConfigError, match="k: 5 at most where near duplicates"):
        best_rows(searcher, query, bounds=Bounds(compared=5))
    assert len(best_rows(searcher, query).ids) <= ROWS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give just one"),
        ({"text": "a", "id": 0}, "give just one"),
        ({"text": "a", "terms": [QueryTerm(text="b")]}, "either terms, or one of"),
        ({"text": "a", "k": 0}, "k is 0"),
        ({"text": "a", "unique_threshold": 2}, "must be from 0 to 1"),
        ({"text": "a", "aesthetic": float("nan")}, "must be finite"),
        ({"text": "a", "weight": 0}, "must be over 0"),
    ],
)
def test_a_query_that_is_none(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Query(**fields)


def test_heads_that_were_not_given(index: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--safe", "--nonviolent", "--aesthetic=1"):
        assert main(["search", "--index", index, "--text", "a", flag]) == 2
        assert "no head for it was given here" in capsys.readouterr().err


def test_flags_of_the_shell_that_do_not_fit(index: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        ([], "a search needs one of --text, --image, --embedding and --id"),
        (["--text", "a", "--text", "b", "--weight", "1"], "--weight is given 1 times for 2 things to search for"),
        (["--text", "a", "dog"], "unrecognized arguments: dog"),
        (["--text", "a", "--where", "x y"], "where, at 'y' (character 3)"),
        (["--text", "a", "--columns", "nowhere"], "no metadata column nowhere"),
    ):
        assert main(["search", "--index", index, *flags]) == 2
        assert message in capsys.readouterr().err


def test_columns_in_text_and_terms_in_a_file(index: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(f"index: [{index}]\ntext: a dog\nid: [4]\nweight: [1, -1]\nsearch: {{where: number = 3}}\n")
    assert main(["search", "--config", str(file), "--columns", "number", "seed"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sorted(line[2:] for line in lines) == [["3", "0"], ["3", "1"]]
