"""The nouns that every folder uses."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clip_batch.types import format_numbers, parse_numbers


@given(st.sets(st.integers(0, 10_000)))
def test_numbers_round_trip(numbers: set[int]) -> None:
    text = format_numbers(numbers)
    assert not numbers or parse_numbers(text) == sorted(numbers)
