"""Scanning the headers of a tar, local or remote, for planning: where it may be cut, and how many samples it has.

A remote tar is read in blocks, one at a time in memory; large members are skipped without a copy of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from clip_batch.errors import InputError
from clip_batch.samples.prefetch import Prefetcher
from clip_batch.samples.tar.cuts import Cuts, cuts, cuts_by_headers
from clip_batch.samples.tar.fast_headers import BLOCK
from clip_batch.samples.tar.headers import (
    END_BLOCKS,
    Damage,
    Link,
    Member,
    NextTar,
    Record,
    as_runs,
    member_runs,
    members,
    next_header,
)
from clip_batch.samples.tar.links import linked_names
from clip_batch.samples.tar.mapping import FIRST_BYTES, compression, map_tar
from clip_batch.samples.tar.samples import NameRule
from clip_batch.samples.tar.suffixes import is_compressed
from clip_batch.storage.paths import is_local, local_path
from clip_batch.storage.transfer import file_version, has_ranges, read_range, remote_file
from clip_batch.types import Shard, Slice

SHORT, LONG = 64 * 2**10, 8 * 2**20
"""Bytes of a request where members are large, and where they are small. A request costs as much as 2 MB of data."""

JUMP = 2**20
"""Bytes between a block and the next header from which short blocks are cheaper."""

Read = Callable[[int, int], bytes]
"""Reads the bytes [start, stop) of a tar."""


def scan_tar(tar: Shard, rule: NameRule = NameRule(), options: dict[str, Any] | None = None) -> tuple[Cuts, int | None]:
    """The cuts of a tar (see `cuts`) and its number of samples; ([], None) if it is compressed or cannot be read.

    OSError: the store does not answer.
    """
    if is_compressed(tar.url):
        return [], None
    try:
        if is_local(tar.url) or tar.size is None or not has_ranges(remote := remote_file(tar.url, options)):
            with Prefetcher(options=options) as files, files.take(Slice(tar)) as (path, _):
                places = cuts(path, rule)
        elif tar.size and compression(read_range(remote, 0, min(FIRST_BYTES, tar.size))):
            return [], None
        else:
            size = tar.size
            read = partial(read_range, remote)
            places = cuts_by_headers(lambda: read_headers(read, size), size, rule)
    except (ValueError, InputError):  # `embed` reports the error
        return [], None
    return places, places[-1][1]


def scan_links(url: str, options: dict[str, Any] | None = None) -> dict[int, list[str]]:
    """The names of the links to each content of a tar, by its offset (see `linked_names`).

    OSError: the store does not answer. InputError: the tar does not exist, or its store gives no ranges of bytes.
    """
    if is_local(url):
        with open(local_path(url), "rb") as file:
            data = map_tar(file, compressed=False).data
        return linked_names(lambda: member_runs(data))
    remote = remote_file(url, options)
    size = file_version(remote).size or 0
    read = partial(read_range, remote)
    return linked_names(lambda: as_runs(read_headers(read, size)))


def read_headers(read: Read, size: int, short: int = SHORT, long: int = LONG, far: int = JUMP) -> Iterator[Record]:
    """`members` of a tar of `size` bytes, read in blocks; one Damage may come in parts, without a NextTar behind it.

    Each block begins where the last member ends, so that no header is cut; a block without a member is read again,
    longer. `short` and `long` are multiples of BLOCK.
    """
    position, length = 0, max(long // 8, short)
    damaged = False  # the block before ended within damage, which lasts until a header with its magic
    while position < size:
        stop = min(position + length, size)
        data = read(position, stop)
        after = position
        if damaged:
            start = next_header(memoryview(data), 0, len(data))
            damaged = start == len(data)
            after += start if not damaged or stop == size else max(start - BLOCK + 1, 1)  # no header begins earlier
            if after > position:
                message = f"bytes {position} to {after} hold no header"
                yield Damage(position, after - position, "corrupt_header", message)
                position, length = after, min(2 * length, long)
                continue
        for item in members(data):
            if isinstance(item, Link):
                after = position + item.end
                yield item._replace(header=position + item.header, end=after)
                continue
            item = item._replace(offset=position + item.offset)
            if isinstance(item, Member):
                after = item.offset + -(-item.size // BLOCK) * BLOCK
                yield item._replace(header=position + item.header)
            elif isinstance(item, NextTar):
                after = item.offset
                yield item
            elif stop < size and item.offset + item.length == stop:
                if item.reason != "truncated_tar":  # else the block ends here, not the tar
                    after = max(item.offset, stop - BLOCK + 1)  # no header begins before that
                    damaged = True
                    yield item._replace(length=after - item.offset)
            else:
                after = item.offset + item.length
                yield item
        if stop == size:
            return
        if after > position:
            length = short if after > stop + far else min(2 * length, long)
            position = after
        elif len(data) > END_BLOCKS * BLOCK and data.count(0) == len(data):
            position = stop - END_BLOCKS * BLOCK  # the next block begins with as many as end a tar
        else:
            length *= 2
