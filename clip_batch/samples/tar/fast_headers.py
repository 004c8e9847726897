"""Runs of plain tar headers, verified together: the fast path of `clip_batch.samples.tar.headers`.

A plain header is what nearly all headers are: a regular file with its size and checksum as tar, Python, Go and
Rust write them, without a prefix or an extended header. All others are left to the strict parser, which reads
plain ones too, with the same result.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK = 512
MOST = 1024  # headers in a run: their 512 kB stay in the processor's cache
_LEAST = 16  # headers; for fewer the strict parser is as fast
_SIZE_AND_TYPE = struct.Struct("124x11s21xs")
_OCTAL_WEIGHTS = 8 ** np.arange(5, -1, -1, dtype=np.uint32)

Fields = tuple[str, int, int, int]
"""The fields of a `clip_batch.samples.tar.headers.Member`: name, offset, size, header."""


class HeaderRun(NamedTuple):
    """The members of plain headers, in order; the next header begins at byte `after` of the buffer.

    The headers between `after` and `strict_until`, if any, are for the strict parser: looking for another run after
    each of them would cost more than parsing them.
    """

    members: Iterator[Fields]
    after: int
    strict_until: int


def plain_run(view: memoryview, start: int, end: int, scratch: npt.NDArray[np.uint8]) -> HeaderRun:
    """The plain headers from byte `start` on whose members end by `end`, up to the first other header.

    `scratch`, uint8 (MOST, BLOCK), is overwritten: fresh memory would cost more than the work done in it.
    """
    headers, sizes, strict_until = _hop(view, start, end)
    if len(headers) < _LEAST:
        return HeaderRun(iter(()), start, strict_until)
    blocks = np.frombuffer(view, np.uint8, (end - start) // BLOCK * BLOCK, start).reshape(-1, BLOCK)
    rows = blocks.take((np.array(headers) - start) // BLOCK, 0, scratch[: len(headers)], "clip")
    checksum = rows[:, 148:154] - ord("0")  # octal digits; other bytes become more than 7
    actual = rows.sum(1, np.uint32) - rows[:, 148:156].sum(1, np.uint32) + 8 * ord(" ")
    good = (checksum @ _OCTAL_WEIGHTS == actual) & (checksum < 8).all(1) & (rows[:, 154] == 0)
    good &= (rows[:, 135] | ord(" ")) == ord(" ")  # the byte that ends the size
    good &= (rows[:, 0] != 0) & (rows[:, 345] == 0)  # the name; the prefix
    count = len(headers) if good.all() else int(good.argmin())
    text = b"\0".join(np.ndarray(count, "S100", rows, strides=(BLOCK,)).tolist()) + b"\0"
    # A name that ends in a slash is a directory of v7 tar. More zero bytes than names: bytes follow a name's end.
    if count == 0 or b"/\0" in text or text.count(b"\0") > count:
        return HeaderRun(iter(()), start, strict_until)
    names = text.decode("utf-8", "surrogateescape").split("\0")[:-1]
    offsets = [header + BLOCK for header in headers]
    after = headers[count] if count < len(headers) else strict_until
    return HeaderRun(zip(names, offsets, sizes, headers, strict=False), after, strict_until)


def _hop(view: memoryview, start: int, end: int) -> tuple[list[int], list[int], int]:
    """Positions and sizes of what seem plain headers, by their sizes alone; the position of the next header."""
    headers: list[int] = []
    sizes: list[int] = []
    position, last = start, end - BLOCK
    unpack, add_header, add_size = _SIZE_AND_TYPE.unpack_from, headers.append, sizes.append
    while position <= last and len(headers) < MOST:
        digits, kind = unpack(view, position)
        if kind != b"0" or not digits.isdigit():
            break
        try:
            size = int(digits, 8)
        except ValueError:  # an 8 or a 9
            break
        if position + size > last:
            break
        add_header(position)
        add_size(size)
        position += size + 1023 & -512
    return headers, sizes, position
