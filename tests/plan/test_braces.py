"""Brace patterns."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_batch.errors import ConfigError
from clip_batch.plan.braces import expand_braces

# A pattern as a tree, and beside it what it means, by plain rules: a literal is itself, an
# alternation is the union of its branches, a range its numbers, a sequence the product of its parts.
Pattern = tuple[str, list[str]]


def _range(bounds: tuple[int, int, int]) -> Pattern:
    first, count, width = bounds
    numbers = [str(number).zfill(width) for number in range(first, first + count)]
    return f"{{{str(first).zfill(width)}..{str(first + count - 1).zfill(width)}}}", numbers


def _alternation(branches: list[Pattern]) -> Pattern:
    return "{" + ",".join(text for text, _ in branches) + "}", [name for _, names in branches for name in names]


def _sequence(parts: list[Pattern]) -> Pattern:
    return "".join(text for text, _ in parts), ["".join(names) for names in itertools.product(*(n for _, n in parts))]


literals = st.text("ab/.-", max_size=3).map(lambda text: (text, [text]))
# Numbers below 1000 in at least 4 digits, or none padded: so that the bounds alone say the width.
ranges = st.tuples(st.integers(0, 900), st.integers(1, 4), st.sampled_from([0, 4, 5])).map(_range)
patterns = st.recursive(
    st.one_of(literals, ranges),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(_alternation), st.lists(inner, max_size=3).map(_sequence)
    ),
    max_leaves=8,
)


@given(patterns)
def test_braces_equal_the_product_of_their_parts(pattern: Pattern) -> None:
    text, names = pattern
    assert expand_braces(text) == names


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{1..010}", [f"{n:03d}" for n in range(1, 11)]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..8..4}", ["0", "4", "8"]),
        ("a{b}c", ["a{b}c"]),
        ("a{b{1,2}}", ["a{b1}", "a{b2}"]),
        ("{a,{b,c}", ["{a,b", "{a,c"]),
        ("{}", ["{}"]),
        ("x}{", ["x}{"]),
        ("{a,}", ["a", ""]),
    ],
)
def test_braces_as_bash_has_them(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


def test_a_range_that_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ConfigError, match="correct the range"):
        expand_braces("{0..99999999999}")
