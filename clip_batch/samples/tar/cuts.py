"""Where a tar may be cut into slices of whole samples."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate

from clip_batch.samples.tar.headers import Record, as_runs, member_runs
from clip_batch.samples.tar.mapping import map_tar
from clip_batch.samples.tar.samples import NameRule, TarSamples, read_samples

Cuts = list[tuple[int, int]]
"""(byte, samples before it) of each place, from (0, 0) to (where the last member ends, all samples)."""


def cuts(tar: str | memoryview | mmap.mmap | bytes, rule: NameRule = NameRule()) -> Cuts:
    """Every place where a tar, given by its local path or its bytes, may be cut.

    No key that occurs before a cut occurs after it, and no link is parted from its target, so that slices between cuts
    hold whole samples. A compressed tar cannot be cut, and has only the first and the last place.
    """
    if not isinstance(tar, str):
        return _cuts(read_samples(lambda: member_runs(tar), rule), len(tar))
    with open(tar, "rb") as file:
        mapped = map_tar(file)
        size = os.fstat(file.fileno()).st_size
    places = _cuts(read_samples(lambda: member_runs(mapped.data), rule), len(mapped.data))
    return places if not mapped.compression else [(0, 0), (size, places[-1][1])]


def cuts_by_headers(headers: Callable[[], Iterable[Record]], size: int, rule: NameRule = NameRule()) -> Cuts:
    """`cuts` of a tar of `size` bytes, from what `headers` gives; it is called again where there are links."""

    return _cuts(read_samples(lambda: as_runs(headers()), rule), size)


def _cuts(samples: TarSamples, size: int) -> Cuts:
    places: list[tuple[int, int]] = [(0, 0)]  # (byte, number of the sample that begins there)
    for number, (_, header, *_) in enumerate(samples.rows()):
        if number:
            places.append((header, number))
        while places[-1][1] > samples.torn.get(number, number):
            places.pop()
    images = samples.images
    # Each member that is an image but for a dot is an item of its own, if its sample has no image.
    more = {number: len(found) - 1 for number, found in sorted(samples.dotted.items()) if not images[number]}
    numbers, totals = list(more), [0, *accumulate(more.values())]
    if more:
        places = [(byte, number + totals[bisect_left(numbers, number)]) for byte, number in places]
    if samples.chains:
        places = _outside(places, samples.chains)
    return [*places, (min(samples.end, size), len(samples.keys) + totals[-1])]


def _outside(places: Cuts, chains: Iterable[tuple[int, int]]) -> Cuts:
    """The places that part no chain of links, each given by its first and last header."""
    ordered = sorted(chains)
    firsts, reach = [first for first, _ in ordered], [0, *accumulate((last for _, last in ordered), max)]
    return [place for place in places if not place[0] or place[0] > reach[bisect_left(firsts, place[0])]]
