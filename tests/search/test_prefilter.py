"""Row sets of conditions: cached within a bound, evaluated once, and by one who waits where another gives up."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clip_batch.errors import ConfigError
from clip_batch.search.conditions import Compare, Condition, Contains, In, Not, Or
from clip_batch.search.evaluate import Check, Evaluator, matches, unchecked
from clip_batch.search.prefilter import Prefilter
from clip_batch.search.rows import EXACT, RowSet


class Rows:
    """A backend that knows one thing: the rows of `n = number` are those before it."""

    def __init__(self, rows: int = 1000) -> None:
        self.rows, self.asked, self.gate = rows, list[Any](), threading.Event()
        self.gate.set()

    def where(self, condition: Condition, check: Check = unchecked) -> RowSet:
        assert isinstance(condition, Compare)
        self.asked.append(condition.value)
        assert self.gate.wait(10)
        check()
        return RowSet.of(np.arange(self.rows) < condition.value)  # type: ignore[operator]


def equal(value: Any) -> Compare:
    return Compare("n", "=", value)


def test_as_many_as_the_limit_holds() -> None:
    backend = Rows()
    size = RowSet.of(np.ones(1000, dtype=bool)).nbytes
    prefilter = Prefilter(backend, 3 * size)  # type: ignore[arg-type]
    for value in (1000, 1000.0, True, 1000):
        prefilter.select(equal(value))
    assert backend.asked == [1000, 1000.0, True]
    for value in (1001, 1002, 1000, 1000.0):
        prefilter.select(equal(value))
    assert backend.asked[3:] == [1001, 1002, 1000.0]  # 1000 was used meanwhile
    none = Prefilter(backend, 0)  # type: ignore[arg-type]
    assert none.select(equal(3)).ids.tolist() == none.select(equal(3)).ids.tolist() == [0, 1, 2]


def test_once_for_all_who_ask_and_again_where_one_gives_up() -> None:
    backend, gone = Rows(), threading.Event()
    prefilter = Prefilter(backend)  # type: ignore[arg-type]

    def leave() -> None:
        if gone.is_set():
            raise ConfigError("gone")

    backend.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(prefilter.select, equal(5), leave)
        while not backend.asked:
            pass
        others = [pool.submit(prefilter.select, equal(5)) for _ in range(6)]
        waiting = pool.submit(prefilter.select, equal(5), leave)
        gone.set()
        with pytest.raises(ConfigError):
            waiting.result(10)  # though the first still works
        backend.gate.set()
        with pytest.raises(ConfigError):
            first.result(10)
        assert [other.result(10).count for other in others] == [5] * 6
    assert backend.asked == [5, 5]


@pytest.mark.parametrize("count", [0, 1, 7, EXACT, EXACT + 1])
def test_row_sets(count: int) -> None:
    rng, rows = np.random.default_rng(count), 30_011
    mask = np.zeros(rows, dtype=bool)
    mask[rng.choice(rows, count, replace=False)] = True
    some = RowSet.of(mask)
    assert (some.count, some.ids.tolist()) == (count, np.flatnonzero(mask).tolist())
    for offset, length in ((0, rows), (0, 8), (3, 5), (8, 1000), (12_345, 10_001), (rows - 1, 1), (rows, 0)):
        others, kept = some.others(offset, length), mask[offset : offset + length]
        assert others.count == length - np.count_nonzero(kept)
        assert np.array_equal(others.has(np.arange(length)), ~kept)
        assert [others.selector.is_member(id) for id in range(min(length, 20))] == kept[:20].tolist()


TEXTS = [
    "Straße",
    "STRASSE",
    "strasse",
    "ﬁsh",
    "Kelvin K",
    "İstanbul",
    "σίσυφος",
    "ΣΊΣΥΦΟΣ",
    "",
    None,
    "a\0b",
    "A.B*",
    "犬",
]


@pytest.mark.parametrize("text", ["SS", "ß", "fi", "k", "i", "ς", "", "\0", ".b*", "B", "犬", "absent"])
def test_contains_is_pythons_casefold(text: str) -> None:
    expected = [value is not None and text.casefold() in value.casefold() for value in TEXTS]
    for values in (pa.array(TEXTS), pa.array(TEXTS, pa.large_string()), pa.array(TEXTS).dictionary_encode()):
        assert matches(Contains("t", text), pa.table({"t": values})).tolist() == expected
    pieces = pa.table({"t": pa.chunked_array([TEXTS[:3], TEXTS[3:3], TEXTS[3:]], pa.string())})
    assert matches(Contains("t", text), pieces).tolist() == expected


def test_a_check_ends_any_condition() -> None:
    def stop() -> None:
        raise ConfigError("late")

    table = pa.table({"t": ["é"], "n": [1]})
    for condition in (Contains("t", "é"), In("n", (1,)), Not(Compare("n", "<", 3)), Or((equal(1), equal(2)))):
        with pytest.raises(ConfigError, match="late"):
            Evaluator(condition, stop).matches(table)
