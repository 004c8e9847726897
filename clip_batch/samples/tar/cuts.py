"""Where a tar may be cut into slices of whole samples."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence

from clip_batch.samples.tar.headers import Member, Record, member_runs
from clip_batch.samples.tar.mapping import map_tar
from clip_batch.samples.tar.samples import TarSamples, group_members
from clip_batch.types import IMAGE_EXTENSIONS

EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json")

Cuts = list[tuple[int, int]]
"""(byte, samples before it) of each place, from (0, 0) to (where the last member ends, all samples)."""


def cuts(tar: str | memoryview | mmap.mmap | bytes, extensions: Sequence[str] = EXTENSIONS) -> Cuts:
    """Every place where a tar, given by its local path or its bytes, may be cut.

    No key that occurs before a cut occurs after it, so that slices between cuts hold whole samples. A gzipped tar
    cannot be cut, and has only the first and the last place. `extensions` are those of which a second member of the
    same key begins a new sample.
    """
    if not isinstance(tar, str):
        return _cuts(group_members(member_runs(tar), extensions), len(tar))
    with open(tar, "rb") as file:
        data, problem = map_tar(file)
        size = os.fstat(file.fileno()).st_size
    places = _cuts(group_members(member_runs(data), extensions), len(data))
    return places if problem is None else [(0, 0), (size, places[-1][1])]


def cuts_by_headers(headers: Iterable[Record], size: int, extensions: Sequence[str] = EXTENSIONS) -> Cuts:
    """`cuts` of a tar of `size` bytes, from its headers."""
    return _cuts(group_members(((item,) if isinstance(item, Member) else item for item in headers), extensions), size)


def _cuts(samples: TarSamples, size: int) -> Cuts:
    places = [(0, 0)]
    for number, (_, header, *_) in enumerate(samples.rows()):
        if number:
            places.append((header, number))
        while places[-1][1] > samples.torn.get(number, number):
            places.pop()
    return [*places, (min(samples.end, size), len(samples.keys))]
