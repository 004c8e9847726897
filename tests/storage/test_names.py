"""Names that are not UTF-8, and their text."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from clip_batch.storage.names import is_utf8, name_text, text_name

UNITS = [b"a", b"\\", b"x", b"e9", b"\xe9", b"\xc3\xa9", b"/", b".jpg", b"\xff", b"\xed\xb3\xa9", b"ff", b"\\xe9"]
NAMES = st.lists(st.sampled_from(UNITS), max_size=12).map(b"".join).map(os.fsdecode)


@given(NAMES, NAMES)
def test_each_name_has_a_text_of_its_own_which_gives_it_back(name: str, other: str) -> None:
    text = name_text(name)
    text.encode()
    assert text_name(text) == name
    assert (text == name_text(other)) == (name == other)


def test_most_names_are_their_own_text() -> None:
    for name in ("café/红.jpg", r"C:\pictures\new\1.jpg", "plain"):
        assert name_text(name) == text_name(name) == name
        assert is_utf8(name)
    assert name_text(os.fsdecode(b"caf\xe9\\1")) == r"caf\xe9\\1"
    assert not is_utf8(os.fsdecode(b"caf\xe9"))
