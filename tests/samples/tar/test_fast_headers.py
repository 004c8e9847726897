"""Runs of plain headers have the same result as the strict parser, byte by byte."""

from __future__ import annotations

import tarfile
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_batch.samples.tar import fast_headers, headers
from clip_batch.samples.tar.fast_headers import MOST, HeaderRun, plain_run
from clip_batch.samples.tar.headers import Damage, Member, members
from tests.samples.tar.test_reader import FORMATS, build, entries

FIELDS = [0, 1, 40, 99, 100, 124, 130, 134, 135, 148, 150, 153, 154, 155, 156, 257, 262, 345, 346, 500]
"""Where a header is changed: its name, size, checksum, type, magic, prefix and padding, and their edges."""

BYTES = b'\0 /.0178"5LSgx\x80\xc3\xff'

changes = st.lists(
    st.tuples(st.integers(0, 60), st.sampled_from(FIELDS), st.sampled_from(BYTES), st.booleans()), max_size=4
)


def strict(data: bytes, start: int = 0, stop: int | None = None) -> list[Member | Damage]:
    with patch.object(headers, "plain_run", lambda view, start, end, scratch: HeaderRun(iter(()), start, end)):
        return list(members(data, start, stop))


def changed(tar: bytes, edits: list[tuple[int, int, int, bool]]) -> bytes:
    """The tar with bytes of its blocks replaced, some with a checksum that fits again."""
    data = bytearray(tar)
    for block, field, byte, mend in edits:
        at = block % (len(data) // 512) * 512
        data[at + field] = byte
        if mend:
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


@settings(max_examples=400)
@given(
    entries, st.sampled_from(sorted(FORMATS)), changes, st.sampled_from([1, 2, 5]), st.integers(0, 600), st.integers(0)
)
def test_runs_are_what_the_strict_parser_finds(
    items: list[tuple[str, int, str]],
    format: str,
    edits: list[tuple[int, int, int, bool]],
    least: int,
    before: int,
    cut: int,
) -> None:
    tar = changed(build(items, FORMATS[format]), edits)
    data = b"x" * before + tar
    stop = len(data) - cut % len(tar) if cut % 3 else None
    with patch.multiple(fast_headers, _LEAST=least, MOST=5), patch.object(headers, "MOST", 5):
        assert list(members(data, before, stop)) == strict(data, before, stop)


def names(data: bytes) -> list[str]:
    run = plain_run(memoryview(data), 0, len(data), np.empty((MOST, 512), np.uint8))
    return [member[0] for member in run.members]


FILES = [(f"{number:03d}.jpg", number * 40, "f") for number in range(40)]


@pytest.mark.parametrize("format", ["ustar", "gnu"])
def test_plain_headers_are_found_in_one_run(format: str) -> None:
    assert names(build(FILES, FORMATS[format])) == [name for name, _, _ in FILES]


def test_a_run_ends_before_a_header_that_does_not_fit_its_checksum() -> None:
    tar = build(FILES, tarfile.USTAR_FORMAT)
    header = [item.header for item in strict(tar) if isinstance(item, Member)][30]
    for place in range(512):
        flipped = tar[: header + place] + bytes([tar[header + place] ^ 1]) + tar[header + place + 1 :]
        assert names(flipped)[:30] == [name for name, _, _ in FILES[:30]][: len(names(flipped))]
        assert len(names(flipped)) in (0, 30) or place in (154, 155)
        assert list(members(flipped)) == strict(flipped)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0), st.integers(1, 255)), max_size=3))
def test_long_tars_with_damage_anywhere(flips: list[tuple[int, int]]) -> None:
    tar = bytearray(build([(f"{number // 3}.{number % 3}", number % 700, "f") for number in range(300)], 0))
    for at, bits in flips:
        tar[at % len(tar)] ^= bits
    assert list(members(bytes(tar))) == strict(bytes(tar))
