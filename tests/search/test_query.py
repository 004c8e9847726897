"""A query that cannot be meant is refused when it is made, with the field, the value and the rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clip_batch import ConfigError, Query, QueryTerm
from clip_batch.search.vectors import checked_vector


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": "5"}, "k is '5': it must be 1 or more"),
        ({"k": 2.5}, "k is 2.5: it must be 1 or more, a whole number"),
        ({"k": True}, "k is True"),
        ({"effort": 0}, "effort is 0: it must be 1 or more"),
        ({"threshold": "0.3"}, "threshold is '0.3': it must be a number"),
        ({"threshold": float("nan")}, "threshold is nan: it must be a number"),
        ({"modality": None}, "modality is None: it must be image or text"),
        ({"modality": ["image"]}, r"modality is \['image'\]"),
        ({"unique": "no"}, "unique is 'no': it must be True or False"),
        ({"safe": "no"}, "safe is 'no': it must be True or False"),
        ({"unique_threshold": "0.9"}, "unique_threshold is '0.9': it must be a number"),
        ({"aesthetic": "0.5"}, "aesthetic is '0.5': it must be a number"),
        ({"weight": "2"}, "weight is '2': it must be a number"),
        ({"where": 5}, "where is 5: it must be a condition as text, or a list of filters"),
        ({"where": {"column": "a", "equals": 3}}, "it must be a condition as text, or a list of filters"),
        ({"where": b"a = 1"}, "where is b'a = 1'"),
        ({"text": ["a dog", "a cat"]}, "it must be one text"),
        ({"text": "", "image": np.zeros((2, 2, 3))}, "it must be a path, a URL or the bytes of an image file"),
        ({"text": "", "id": "7"}, "id is '7': it must be the whole number of a row"),
        ({"text": "", "terms": "a dog"}, "terms is 'a dog': it must be a list of QueryTerm"),
        ({"text": "", "terms": [{"text": "a dog"}]}, "it must be a list of QueryTerm"),
    ],
)
def test_a_query_with_a_field_of_the_wrong_type_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Query(**{"text": "a dog", **fields})


@pytest.mark.parametrize("fields", [{"text": 5}, {"id": True}, {"text": "a dog", "weight": "1"}])
def test_a_term_with_a_field_of_the_wrong_type_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="it must be"):
        QueryTerm(**fields)


def test_numbers_of_numpy_are_taken() -> None:
    query = Query(id=np.int64(7), k=np.int32(3), threshold=np.float32(0.5), unique=np.bool_(True))  # type: ignore[arg-type]
    assert query.describe() == Query(id=7, k=3, threshold=0.5, unique=True).describe()


@pytest.mark.parametrize("text", ["   ", "\t\n", "\udce7\udc8c\udcab", "a dog \ud83d"])
def test_what_is_no_text_is_refused(text: str) -> None:
    for make in (Query, QueryTerm):
        with pytest.raises(ConfigError, match="a query's text is"):
            make(text=text)


def test_an_empty_condition_is_refused() -> None:
    with pytest.raises(ConfigError, match="where is empty"):
        Query(text="a dog", where=" ")


@pytest.mark.parametrize("values", [[True, False], np.ones(2, bool), np.ones(2) * 1j, ["1", "2"], np.array(["1", "2"])])
def test_a_vector_of_other_things_than_numbers_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError, match="not a list of numbers"):
        checked_vector(values, 2, "embedding")
