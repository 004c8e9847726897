"""Finds cuts: the places between two samples of a large shard where partitions may end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from clip_batch.plan.pack import Cut
from clip_batch.plan.parquet import read_footer
from clip_batch.plan.specs import Options
from clip_batch.types import Plan, Shard

SCANS = 8
"""Tars whose headers are scanned at once."""

FindCuts = Callable[[Shard, Sequence[float]], Sequence[Cut]]
"""The cuts of a shard nearest to the places; none if the shard cannot be cut."""


def find_cuts(
    shards: Sequence[Shard], places: Mapping[int, Sequence[float]], find: FindCuts
) -> dict[int, Sequence[Cut]]:
    """The cuts of shards, by number, nearest to the places that `places_to_cut` gave; shards without any are absent."""
    with ThreadPoolExecutor(SCANS) as pool:
        found = pool.map(lambda number: find(shards[number], places[number]), places)
        return {number: cuts for number, cuts in zip(places, found, strict=True) if cuts}


def folder_cuts(folder: Shard, places: Sequence[float]) -> list[Cut]:
    """The cuts of a folder of files: before any sample but the first."""
    numbers = {min(max(round(place), 1), (folder.samples or 1) - 1) for place in places}
    return [Cut(number, number) for number in sorted(numbers) if number > 0]


def tar_cuts(tar: Shard, places: Sequence[float], by_samples: bool, draft: Plan, options: Options) -> list[Cut]:
    """The cuts of a tar, whose headers are scanned; [] if it is compressed or cannot be read.

    `draft` says how names make samples. Places are in samples with `by_samples`, else in bytes. OSError: the store
    does not answer.
    """
    from clip_batch.samples.tar.samples import NameRule
    from clip_batch.samples.tar.scan import scan_tar

    cuts = [
        Cut(at, samples) for at, samples in scan_tar(tar, NameRule.of(draft), options)[0] if 0 < at < (tar.size or 0)
    ]
    axis = [cut.samples if by_samples else cut.at for cut in cuts]
    return [cuts[_nearest(axis, place)] for place in places] if cuts else []


def parquet_cuts(shard: Shard, places: Sequence[float], by_samples: bool, options: Options) -> list[Cut]:
    """The cuts of a file, between row groups or before the first; [] if it has only one, or cannot be read.

    Places are in samples with `by_samples`, else in bytes. OSError: the store does not answer.
    """
    file = read_footer(shard, options)
    if file is None or not file.cuttable or len(file.groups) < 2:
        return []
    cuts = [Cut(0, 0), *(Cut(group.start, group.first) for group in file.groups[1:])]
    axis = [cut.samples if by_samples else cut.at for cut in cuts]
    return [cuts[_nearest(axis, place)] for place in places]


def _nearest(axis: Sequence[int], place: float) -> int:
    """The index of the value of a sorted axis that is nearest to a place; the later of two that are equally near."""
    after = min(bisect_left(axis, place), len(axis) - 1)
    return after - (after > 0 and place - axis[after - 1] < axis[after] - place)
