"""Runs of plain tar headers, verified together: the shortcut of `clip_batch.samples.tar.headers`.

Only what nearly all headers are is known here: a regular file with its size and checksum as tar,
Python, Go and Rust write them, without a prefix or an extended header. All else is left to the
strict parser, which finds the same in these, one by one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK = 512
MOST = 1024  # headers of a run: their 512 kB stay in the processor's cache
_LEAST = 16  # below this the strict parser is as fast
_SIZE_AND_TYPE = struct.Struct("124x11s21xs")
_PLACES = 8 ** np.arange(5, -1, -1, np.uint32)

Fields = tuple[str, int, int, int]
"""The fields of a `clip_batch.samples.tar.headers.Member`: name, offset, size, header."""


class HeaderRun(NamedTuple):
    """`members`, in order; the next header lies at `after`, a byte of the buffer.

    Where `seen` lies beyond `after`, the headers between are the strict parser's: looking at them again
    here, after each that it reads, would cost more than it.
    """

    members: Iterator[Fields]
    after: int
    seen: int


def plain_run(view: memoryview, start: int, end: int, scratch: npt.NDArray[np.uint8]) -> HeaderRun:
    """The plain headers from `start` on whose members end by `end`, up to the first that is another.

    `scratch` is uint8 (MOST, BLOCK), overwritten: fresh memory costs more than what is done with it.
    """
    headers, sizes, seen = _hop(view, start, end)
    if len(headers) < _LEAST:
        return HeaderRun(iter(()), start, seen)
    blocks = np.frombuffer(view, np.uint8, (end - start) // BLOCK * BLOCK, start).reshape(-1, BLOCK)
    found = blocks.take((np.array(headers) - start) // BLOCK, 0, scratch[: len(headers)], "clip")
    checksum = found[:, 148:154] - ord("0")  # digits; other bytes become more than 7
    actual = found.sum(1, np.uint32) - found[:, 148:156].sum(1, np.uint32) + 8 * ord(" ")
    good = (checksum @ _PLACES == actual) & (checksum < 8).all(1) & (found[:, 154] == 0)
    good &= (found[:, 135] | ord(" ")) == ord(" ")  # the byte that ends the size
    good &= (found[:, 0] != 0) & (found[:, 345] == 0)  # the name; the prefix
    count = len(headers) if good.all() else int(good.argmin())
    text = b"\0".join(np.ndarray(count, "S100", found, strides=(BLOCK,)).tolist()) + b"\0"
    # A name that ends in a slash is a directory, as v7 wrote it; or there are bytes after a name's end.
    if count == 0 or b"/\0" in text or text.count(b"\0") > count:
        return HeaderRun(iter(()), start, seen)
    names = text.decode("utf-8", "replace").split("\0")[:-1]
    offsets = [header + BLOCK for header in headers]
    after = headers[count] if count < len(headers) else seen
    return HeaderRun(zip(names, offsets, sizes, headers, strict=False), after, seen)


def _hop(view: memoryview, start: int, end: int) -> tuple[list[int], list[int], int]:
    """Headers and sizes of what seem regular files; where the next header should lie."""
    headers: list[int] = []
    sizes: list[int] = []
    position, last = start, end - BLOCK
    unpack, found, sized = _SIZE_AND_TYPE.unpack_from, headers.append, sizes.append
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
        found(position)
        sized(size)
        position += size + 1023 & -512
    return headers, sizes, position
