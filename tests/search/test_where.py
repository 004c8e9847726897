"""The text form of conditions: its meaning, its round trip, and the errors of wrong texts."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.errors import ConfigError
from clip_batch.search.conditions import OPERATORS, And, Compare, Condition, Contains, In, IsNull, Not, Or
from clip_batch.search.filters import Filter
from clip_batch.search.where import DEEPEST, as_condition, parse_where
from tests import ROOT

names = st.one_of(
    st.sampled_from(["a", "width", "exif.width", "a-b", "my column", 'say "x"', "", "AND", "null", "9lives", "größe"]),
    st.text(max_size=5),
)
values = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
)  # fmt: skip
conditions: st.SearchStrategy[Condition] = st.recursive(
    st.one_of(
        st.builds(Compare, names, st.sampled_from(OPERATORS), values),
        st.builds(In, names, st.lists(values, max_size=4).map(tuple)),
        st.builds(Contains, names, st.text(max_size=8)),
        st.builds(IsNull, names),
    ),
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(And, st.lists(inner, min_size=2, max_size=4).map(tuple)),
        st.builds(Or, st.lists(inner, min_size=2, max_size=4).map(tuple)),
    ),
    max_leaves=12,
)


@settings(max_examples=200)
@given(conditions)
def test_the_text_of_a_condition_means_that_condition(condition: Condition) -> None:
    assert repr(parse_where(str(condition))) == repr(condition)  # repr: 1, 1.0 and True are equal


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ('license = "cc0" and width > 512', And((Compare("license", "=", "cc0"), Compare("width", ">", 512)))),
        ("a=1 or b=2 and not c=3", Or((Compare("a", "=", 1), And((Compare("b", "=", 2), Not(Compare("c", "=", 3))))))),
        ("(a=1 or b=2) AND c!=3", And((Or((Compare("a", "=", 1), Compare("b", "=", 2))), Compare("c", "!=", 3)))),
        ("a in (1, 2.5, 'x', true)", In("a", (1, 2.5, "x", True))),
        ("a Not In ()", Not(In("a", ()))),
        ("caption CONTAINS 'it''s'", Contains("caption", "it's")),
        ('caption not contains """"', Not(Contains("caption", '"'))),
        ("a is null and b IS NOT NULL", And((IsNull("a"), Not(IsNull("b"))))),
        ('"my column" >= -.5e1', Compare("my column", ">=", -5.0)),
        ("exif.width<=+7", Compare("exif.width", "<=", 7)),
        ("a = false", Compare("a", "=", False)),
        ("\n not not (a\t= 1) ", Not(Not(Compare("a", "=", 1)))),
        ("größe = 1", Compare("größe", "=", 1)),
    ],
)
def test_what_texts_mean(text: str, condition: Condition) -> None:
    assert repr(parse_where(text)) == repr(condition)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "where, at its end: expected the name of a column"),
        ("a == 1", r"where, at '== 1' \(character 3\): == is not known here: write ="),
        ("a <> 1", "<> is not known here: write !="),
        ("a = cc0", r"where, at 'cc0' \(character 5\): expected a value: write \"cc0\" in quotes"),
        ("a = null", "write is null, or is not null"),
        ("a is 3", "expected null after is: to compare with a value write ="),
        ("width > ", "where, at its end: expected a value: a text in quotes, a number, true or false"),
        ("width > 5px", r"at '5px' \(character 9\): expected a column, an operator or a value"),
        ("a = 'x", r"at \"'x\" \(character 5\): the text has no closing quote"),
        ("a and b", r"at 'and b' \(character 3\): expected =, !=, .* or is null after column a"),
        ("(a = 1", r"where, at its end: expected \)"),
        ("a = 1 b = 2", r"at 'b = 2' \(character 7\): expected and, or, or the end"),
        ("a = 1)", r"at '\)' \(character 6\): expected and, or, or the end"),
        ("in = 3", 'write "in" in quotes if it is one'),
        ("a in 3", r"expected \("),
        ("a in (1 2)", "expected ,"),
        ("a contains 3", "expected a text in quotes"),
        ("a ~ 3", r"at '~ 3' \(character 3\)"),
        ("a = 1e999", "this number is too large"),
        ("a = " + "1" * 5000, "this number has too many digits"),
        ("(" * (DEEPEST + 1), f"more than {DEEPEST} brackets"),
        ("not " * 5000 + "a = 1", f"more than {DEEPEST} brackets"),
    ],
)
def test_a_wrong_text_is_refused_in_one_line_that_names_the_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse_where(text)
    assert "\n" not in str(raised.value)


@given(st.text(alphabet="ab=<>!()\"' ,12.-nottruein", max_size=20))
def test_any_text_is_understood_or_refused(text: str) -> None:
    try:
        condition = parse_where(text)
    except ConfigError:
        return
    assert repr(parse_where(str(condition))) == repr(condition)


def test_every_form_of_where() -> None:
    tree = Compare("a", "=", 1)
    assert as_condition("a = 1") is not None
    for form in ("a = 1", tree, [{"column": "a", "equals": 1}], [Filter(column="a", equals=1)]):
        assert as_condition(form) == tree  # type: ignore[arg-type]
    assert as_condition(None) is as_condition("") is as_condition(" ") is as_condition([]) is None
    ranged = as_condition([{"column": "a", "min": 1, "max": 2}, {"column": "b", "in": ["x"]}])
    assert str(ranged) == '(a >= 1 and a <= 2) and b in ("x")'
    with pytest.raises(ConfigError, match=r"filter .*give exactly one of equals"):
        as_condition([{"column": "a"}])
    with pytest.raises(ConfigError, match=r"filter .*column: Field required"):
        as_condition([{"colum": "a", "equals": 1}])


def test_the_conditions_in_the_documents_are_understood() -> None:
    text = (ROOT / "docs/search.md").read_text() + (ROOT / "docs/training.md").read_text()
    shown = re.findall(r"where[ =]'([^'\n]+)'", text)
    assert len(shown) >= 4
    for where in shown:
        assert str(parse_where(where)) == where
