"""Tar headers: a strict parser over a buffer.

It knows POSIX ustar and PAX, GNU long names and base-256 sizes, and old v7 headers, and verifies every checksum;
only headers are copied. After a broken header it searches for the next good one, and reports the bytes that were
lost. Tars that were joined by `cat` are read whole: behind two or more zero blocks, which end a tar, another one
begins. A tar without the closing zero blocks is whole too. Plain headers are verified many at once (`plain_run`),
with the same result.
"""

from __future__ import annotations

import mmap
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from clip_batch.samples.tar.fast_headers import BLOCK, MOST, Fields, plain_run

_LARGEST = 2**62  # bytes; a member that claims more is damage
END_BLOCKS = 2
"""Zero blocks that end a tar. One alone ends nothing: some programs leave one between members."""

_LONGEST_EXTENDED = 2**20  # bytes; a PAX or long-name record that claims more is damage
_HEADER = struct.Struct("100s24x12s12x8ss100x8s80x155s12x")  # name, size, checksum, type, magic, prefix
_LINK_AT, _MAGIC_AT = 157, 257
_MAGIC = re.compile(rb"ustar[\0 ]")
_NOT_ZERO = re.compile(rb"[^\0]")


class Member(NamedTuple):
    """A regular file in a tar: `size` bytes at `offset`; its headers start at `header` (bytes).

    `name` is as `clip_batch.storage.names` says: no two names of different bytes are equal.
    """

    name: str
    offset: int
    size: int
    header: int


class Damage(NamedTuple):
    """The bytes [offset, offset + length) that could not be read, with one of SHARD_REASONS."""

    offset: int
    length: int
    reason: str
    message: str


class Link(NamedTuple):
    """A hard or a soft link to `target`, as it is written in the tar; its headers are the bytes [header, end)."""

    name: str
    target: str
    soft: bool
    header: int
    end: int


class NextTar(NamedTuple):
    """Another tar begins at byte `offset`, behind the zero blocks that end the one before it."""

    offset: int


Record = Member | Link | Damage | NextTar
Run = Iterable[Fields] | Link | Damage | NextTar


def members(data: memoryview | mmap.mmap | bytes, start: int = 0, stop: int | None = None) -> Iterator[Record]:
    """Every regular member and link of the bytes [start, stop), in order, and every Damage and NextTar between them.

    A last member that is cut off has the size that its header states, and a Damage follows it. Directories and devices
    are skipped; so are the contents of global PAX headers, which would give all members the same name.
    """
    for run in member_runs(data, start, stop):
        if isinstance(run, (Link, Damage, NextTar)):
            yield run
        else:
            yield from map(Member._make, run)


def member_runs(data: memoryview | mmap.mmap | bytes, start: int = 0, stop: int | None = None) -> Iterator[Run]:
    """`members` in runs of as many as are parsed at once, each member as a plain tuple of its fields."""
    view = memoryview(data)
    end = len(view) if stop is None else min(stop, len(view))
    position = start
    header = -1  # where the extended headers of the next member start; -1: it has none so far
    long_name: bytes | None = None
    long_link: bytes | None = None
    pax: dict[bytes, bytes] = {}
    unpack, adler32 = _HEADER.unpack_from, zlib.adler32
    scratch = np.empty((MOST, BLOCK), np.uint8)
    strict_until = start  # headers before this are parsed one by one: a run has looked at them and met one not plain
    while position < end:
        if position >= strict_until and header < 0:
            run = plain_run(view, position, end, scratch)
            if run.after > position:
                yield run.members
            position, strict_until = run.after, run.strict_until
        if end - position < BLOCK:
            if _NOT_ZERO.search(view, position, end):
                yield _cut_header(view, position, end, start)
            return
        name, size_field, sum_field, kind, magic, prefix = unpack(view, position)
        # The low half of Adler-32 is 1 + the sum of the bytes modulo 65521: exact for 256 bytes, and
        # an order of magnitude faster than sum().
        left = adler32(view[position : position + 256]) & 0xFFFF
        right = adler32(view[position + 256 : position + BLOCK]) & 0xFFFF
        if left == 1 and right == 1:
            nonzero = _NOT_ZERO.search(view, position, end)
            if nonzero is None:
                return
            zeros = (nonzero.start() - position) // BLOCK
            position += zeros * BLOCK
            if zeros >= END_BLOCKS:
                yield NextTar(position)
                header, long_name, long_link, pax = -1, None, None, {}
            continue
        try:
            if _number(sum_field) != left + right + 255 - (adler32(sum_field) & 0xFFFF):
                _check_signed(view, position, sum_field)
            size = _number(size_field)
            if kind in b"xLKgX" and size > _LONGEST_EXTENDED:
                raise ValueError(f"an extended header of {size} bytes")
            body = position + BLOCK
            after = body + (size + 511 & -512)
            if kind == b"0" or kind == b"\0" or kind == b"7":
                if pax:
                    size = int(pax.get(b"size", size))
                    after = body + (size + 511 & -512)
                    if any(field.startswith(b"GNU.sparse") for field in pax):
                        raise ValueError("a sparse file; write the tar without --sparse")
                name = _whole_name(pax.get(b"path", long_name), name, magic, prefix)
                if size > _LARGEST:
                    raise ValueError(f"a member of {size} bytes")
                if name[-1:] != b"/":  # else a directory of v7 tar
                    yield ((_text(name), body, size, position if header < 0 else header),)
                elif kind == b"\0":
                    after = body
            elif kind in b"xX":
                header = position if header < 0 else header
                if after <= end:
                    pax = _pax(bytes(view[body : body + size]))
            elif kind in b"LK":
                header = position if header < 0 else header
                text = bytes(view[body : body + size]).partition(b"\0")[0]
                long_name, long_link = (text, long_link) if kind == b"L" else (long_name, text)
            elif kind == b"S":
                raise ValueError("a sparse file; write the tar without --sparse")
            elif kind in b"123456":  # no data follows, whatever the size says
                after = body
                if kind in b"12":
                    name = _whole_name(pax.get(b"path", long_name), name, magic, prefix)
                    field = bytes(view[position + _LINK_AT : position + _MAGIC_AT]).partition(b"\0")[0]
                    target = pax.get(b"linkpath", field if long_link is None else long_link)
                    start_of_link = position if header < 0 else header
                    yield Link(_text(name), _text(target), kind == b"2", start_of_link, body)
        except ValueError as error:
            yield (damage := _bad_header(view, position, end, start, str(error)))
            position += damage.length
            if position < end and not any(view[max(position - END_BLOCKS * BLOCK, damage.offset) : position]):
                yield NextTar(position)
            header, long_name, long_link, pax = -1, None, None, {}
            continue
        if after > end and body + size > end:
            lost = header if header >= 0 else position
            message = f"the tar ends at byte {end}, {body + size - end} bytes early; copy or download it again"
            yield Damage(lost, end - lost, "truncated_tar", message)
            return
        if header >= 0 and kind not in b"xXLKg":
            header, long_name, long_link, pax = -1, None, None, {}
        position = after


def _whole_name(long_name: bytes | None, name: bytes, magic: bytes, prefix: bytes) -> bytes:
    """The name in a member's extended headers, or if they have none (None) that in the fields of its header."""
    if long_name is not None:
        return long_name
    name = name.partition(b"\0")[0]
    return prefix.partition(b"\0")[0] + b"/" + name if prefix[0] and magic[:6] == b"ustar\0" else name


def as_runs(records: Iterable[Record]) -> Iterator[Run]:
    """What `members` gives, in the form of `member_runs`."""
    return ((item,) if isinstance(item, Member) else item for item in records)


def name_and_size(block: bytes) -> tuple[str, int]:
    """The name and the size in one header block; extended headers before it may overrule them.

    ValueError: it is not the header of a regular file.
    """
    name, size, total, kind, magic, prefix = _HEADER.unpack(block)
    if kind not in (b"0", b"\0", b"7") or _number(total) != sum(block) - sum(total) + 256:
        raise ValueError("no header of a file")
    return _text(_whole_name(None, name, magic, prefix)), _number(size)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """Parse a numeric header field: octal digits, or GNU's base-256; ValueError on anything else."""
    digits = field.partition(b"\0")[0].strip()
    if digits.isdigit():
        return int(digits, 8)
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    if digits:
        raise ValueError("a number that is not octal")
    return 0


def _check_signed(view: memoryview, position: int, field: bytes) -> None:
    """ValueError unless the checksum is right for signed bytes, which some old programs summed."""
    signed = sum(view[position : position + BLOCK].cast("b")) - sum(memoryview(field).cast("b")) + 256
    if _number(field) != signed:
        raise ValueError("a header whose checksum is wrong")


def _pax(records: bytes) -> dict[bytes, bytes]:
    """The "length key=value" records of an extended header; ValueError where they are malformed."""
    fields = {}
    while records.strip(b"\0"):
        digits, space, _ = records.partition(b" ")
        length = int(digits) if digits.isdigit() and space else 0
        key, equals, value = records[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or records[length - 1 : length] != b"\n":
            raise ValueError("a malformed PAX header")
        if key == b"size" and not value.isdigit():
            raise ValueError("a malformed PAX size")
        fields[key] = value
        records = records[length:]
    return fields


def next_header(view: memoryview, position: int, end: int) -> int:
    """The first byte from `position` on of a whole header with its magic and checksum; `end` if there is none."""
    for magic in _MAGIC.finditer(view, position + _MAGIC_AT, end):
        block = magic.start() - _MAGIC_AT
        if block + BLOCK > end:
            break
        field = bytes(view[block + 148 : block + 156])
        try:
            if field.strip(b"\0 ") and _number(field) == sum(view[block : block + BLOCK]) - sum(field) + 256:
                return block
        except ValueError:
            continue
    return end


def _bad_header(view: memoryview, position: int, end: int, start: int, what: str) -> Damage:
    """The damage from a bad header to the next good one."""
    following = next_header(view, position + 1, end)
    if position == start == 0 and following == end and not _MAGIC.match(view, _MAGIC_AT, end):
        return _not_a_tar(view, end)
    message = f"{what} at byte {position}: bytes {position} to {following} are lost; write the tar again"
    return Damage(position, following - position, "corrupt_header", message)


def _cut_header(view: memoryview, position: int, end: int, start: int) -> Damage:
    """The damage where the file ends within a header block."""
    if position == start == 0 and not _MAGIC.match(view, _MAGIC_AT, end):
        return _not_a_tar(view, end)
    message = f"the tar ends at byte {end}, within a header; copy or download it again"
    return Damage(position, end - position, "truncated_tar", message)


def _not_a_tar(view: memoryview, end: int) -> Damage:
    first = bytes(view[:24]).decode("ascii", "backslashreplace")
    return Damage(0, end, "not_a_tar", f"not a tar: it begins with {first!r}; look at what made or downloaded it")
