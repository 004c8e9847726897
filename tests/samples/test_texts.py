"""Captions and JSON side-cars: a rule for each kind of bad input."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.samples.texts import decode_caption, decode_json, decode_texts
from clip_batch.types import Sample


@pytest.mark.parametrize(
    ("raw", "caption", "warnings"),
    [
        (b" a cat\n", "a cat", []),
        (None, None, ["missing_caption"]),
        (b"", None, ["missing_caption"]),
        (b" \n\t", None, ["missing_caption"]),
        (b"\xef\xbb\xbfbom", "bom", []),
        (b"\xef\xbb\xbf", None, ["missing_caption"]),
        (b"caf\xe9!", "caf\ufffd!", ["bad_utf8"]),
        (b"a\0b", "a\0b", []),
        (b"x" * 10_000, "x" * 10_000, []),
        ("猫".encode(), "猫", []),
        ("猫 cat".encode("utf-16"), "猫 cat", []),
        (b"\xfe\xff" + "猫".encode("utf-16-be"), "猫", []),
        ("猫".encode("utf-32"), "猫", []),
        ("猫".encode("utf-16") + b"!", "猫\ufffd", ["bad_utf8"]),
    ],
)
def test_captions(raw: bytes | None, caption: str | None, warnings: list[str]) -> None:
    assert decode_caption(raw) == (caption, warnings)


@pytest.mark.parametrize(
    ("raw", "fields", "warnings"),
    [
        (None, {}, []),
        (b'{"a": 1, "b": null}', {"a": 1, "b": None}, []),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}, []),
        (b'{"a": 1', {"_raw": '{"a": 1'}, ["bad_json"]),
        (b"[1]", {"_raw": "[1]"}, ["bad_json"]),
        (b"", {"_raw": ""}, ["bad_json"]),
        (
            b'{"a": NaN, "b": -Infinity, "c": 1e999, "d": 1.5}',
            {"a": None, "b": None, "c": None, "d": 1.5},
            ["infinite_number"],
        ),
        (b'{"a": NaN, "b": [NaN]}', {"a": None, "b": [None]}, []),
        ('{"a": "猫"}'.encode("utf-16"), {"a": "猫"}, []),
        (b'{"a": 1, "b": 2, "a": 3}', {"a": 3, "b": 2, "_raw": '{"a": 1, "b": 2, "a": 3}'}, ["repeated_field"]),
        (b'{"a": {"b": 1, "b": 2}}', {"a": {"b": 2}, "_raw": '{"a": {"b": 1, "b": 2}}'}, ["repeated_field"]),
        (b'{"a": 123456789012345678901234567890}', {"a": 123456789012345678901234567890}, []),
        (b'{"a": "caf\xe9"}', {"a": "caf\ufffd"}, ["bad_utf8"]),
        (b'{"a": ["\\ud83d\\ude00", "\\ud83d"]}', {"a": ["😀", "\ufffd\ufffd\ufffd"]}, []),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", {"_raw": '{"a": ' + "[" * 200 + "]" * 200 + "}"}, ["bad_json"]),
        (b"[" * 100_000, {"_raw": "[" * 100_000}, ["bad_json"]),
        (b'{"a": ' + b"9" * 5000 + b"}", {"_raw": '{"a": ' + "9" * 5000 + "}"}, ["bad_json"]),
    ],
)
def test_json(raw: bytes | None, fields: dict[str, object], warnings: list[str]) -> None:
    assert decode_json(raw) == (fields, warnings)


@settings(max_examples=150)
@given(
    st.binary(max_size=60)
    | st.recursive(st.text() | st.floats(), st.lists).map(lambda v: json.dumps({"a": v}).encode())
)
def test_json_can_always_be_written_again(raw: bytes) -> None:
    fields, _ = decode_json(raw)
    json.dumps(fields, allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        ('" a cat\\n"', "a cat"),
        ('["", null, " ", "a cat", "a pet"]', "a cat"),
        ('[["a cat"]]', "a cat"),
        ("7", "7"),
        ("NaN", None),
        ("null", None),
        ('" "', None),
        ("[]", None),
        ('{"en": "a cat"}', None),
        ('"half \\ud83d"', "half \ufffd\ufffd\ufffd"),
    ],
)
def test_the_caption_field_goes_before_parquet_and_the_file(value: str, caption: str | None) -> None:
    sample = Sample("a", "a.tar", None, None, b"", b"of the file", f'{{"c": {value}}}'.encode(), "of Parquet")
    assert decode_texts(sample, "c").caption == (caption or "of Parquet")
    sample = sample._replace(beside=None)
    assert decode_texts(sample, "c").caption == (caption or "of the file")
    assert decode_texts(sample).caption == decode_texts(sample, "d").caption == "of the file"
    without = decode_texts(sample._replace(caption=None), "c")
    assert (without.caption, without.warnings) == (caption, [] if caption else ["missing_caption"])
    assert "c" in without.fields
