"""Tokens made word by word are open_clip's own."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow

NASTY = [
    "",
    " ",
    "a photo of a cat",
    "  A\tDOG\r\nruns\x0bfast\x1c ",
    "AT&T &amp; co, &amp;amp;lt; &ampamp &#x2019; &hellip; &not",
    "<start_of_text> and <|endoftext|> <END_OF_TEXT>x <end_of_text",
    "it's I'LL don't 'tis ''s 're've",
    "âœ” No problems, sÃ³, voilÃ\xa0le, “curly” ‘quotes’",
    "ＬＯＵＤ　ＮＯＩＳＥＳ ﬁne ﬆ ½ ² ٣ 三 İstanbul ǅ ß",
    "\x1b[36;44mblue\x1b[0m \x00\x01\x7f\x85\u2028\u200b\ufeff\u00ad",
    "e\u0301 \u1e9b\u0323 👩‍👩‍👧 🏴󠁧󠁢󠁷󠁬󠁳󠁿 \ud83d \U0010ffff",
    "12345 3.14 1,000 #42 v2.0-beta_1 C++ http://a.b/c?d=e&f=g;h",
    "word " * 100,
    "x" * 500,
    "<b>AT&amp;T</b>\n&eacute; P&EACUTE;REZ",
]
PIECES = [*"aZ9 .'&;<>#\t\n\r\x00\x1b\x1c\x7f\xa0éÃ©â€™“ﬁ中", "&amp;", "&lt;", "'s", "<end_of_text>", "\x1b[1m"]


@cache
def pair() -> tuple[Any, Any]:
    from open_clip.tokenizer import SimpleTokenizer

    from clip_batch.encoders.word_tokenizer import by_words

    theirs = SimpleTokenizer()
    ours = by_words(theirs)
    assert ours is not theirs
    return ours, theirs


def same(texts: list[str]) -> None:
    import torch

    ours, theirs = pair()
    found, expected = ours(texts), theirs(texts)
    assert found.dtype == expected.dtype == torch.int64
    assert torch.equal(found, expected)


def test_nasty_texts_have_open_clips_tokens() -> None:
    same([text.encode(errors="replace").decode() for text in NASTY])
    same([])


@settings(max_examples=500, deadline=None)
@given(st.lists(st.text() | st.text(alphabet=st.characters(max_codepoint=127)), max_size=4))
def test_any_text_has_open_clips_tokens(texts: list[str]) -> None:
    same([text.encode(errors="replace").decode() for text in texts])


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join))
@example("&#38;amp;lt; a")
def test_texts_that_are_cleaned_have_open_clips_tokens(text: str) -> None:
    same([text])


def test_all_letters_of_alphabets_have_open_clips_tokens() -> None:
    for first in range(0, 0x3100, 16):
        same([f"a{character}b {character}" for character in map(chr, range(first, first + 16))])


@pytest.mark.parametrize("options", [{"clean": "whitespace"}, {"reduction_mask": "simple"}])
def test_a_tokenizer_of_another_kind_is_left_alone(options: dict[str, str]) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    from clip_batch.encoders.word_tokenizer import by_words

    other = SimpleTokenizer(**options)
    assert by_words(other) is other
    assert by_words(str.split) is str.split


def test_another_context_and_more_special_tokens() -> None:
    import torch
    from open_clip.tokenizer import SimpleTokenizer

    from clip_batch.encoders.word_tokenizer import by_words

    theirs = SimpleTokenizer(context_length=9, additional_special_tokens=["<cat>"])
    texts = [text.encode(errors="replace").decode() for text in [*NASTY, "a <CAT>s <cat>", "<cat>" * 20]]
    assert torch.equal(by_words(theirs)(texts), theirs(texts))
