"""Packs shards into partitions. Pure: it reads nothing, and the same shards give the same partitions."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from math import ceil

from clip_batch.errors import ConfigError
from clip_batch.types import Partition, Shard, Slice

MOST_PARTITIONS = 1_000_000


Cut = tuple[int, int]
"""A place between two samples of a shard: (byte, or with files the sample's number; samples before it)."""


Split = Callable[[Shard, Sequence[float]], Sequence[Cut]]
"""The cuts of a shard nearest to the wanted places, which are in the unit of the target; [] if it has none."""


def pack(
    shards: Sequence[Shard], target: dict[str, int], split: Split = lambda shard, places: ()
) -> tuple[Partition, ...]:
    """Pack shards into partitions, in order; every shard once, or as slices that tile it.

    `target` is {"bytes": n} or {"samples": n} a partition, or {"partitions": n}. With a total of T
    and n = ceil(T / target) partitions, the ends lie at k * T / n, moved to the nearest end of a
    shard; or inside it, where the shard is larger than the target and `split` finds cuts. So a
    partition is off T / n by less than one shard. Ends that meet are one: shards that cannot be
    split may make fewer partitions than n.
    """
    ((unit, value),) = target.items()
    weights = _weights(shards, unit)
    ends = list(accumulate(weights))
    total = ends[-1]
    count = value if unit == "partitions" else max(1, ceil(total / value))
    if count > MOST_PARTITIONS:
        raise ConfigError(f"{count:,} partitions are over {MOST_PARTITIONS:,}: raise the partition target")
    # Of a count, the target is only what follows from it: a shard 10 % larger is not worth a header scan.
    largest = 1.1 * total / count if unit == "partitions" else value
    bounds = {(0, 0, 0), (len(shards), 0, 0)}  # (number of the shard, place in it, samples before the place)
    inside: dict[int, list[float]] = {}
    for k in range(1, count):
        number = min(bisect_right(ends, total * k / count), len(shards) - 1)
        place = total * k / count - (ends[number] - weights[number])
        if weights[number] > largest:
            inside.setdefault(number, []).append(place)
        else:
            bounds.add(_nearest_end(number, place, weights[number]))
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda number: split(shards[number], inside[number]), inside)
        for (number, places), cuts in zip(inside.items(), found, strict=True):
            bounds.update((number, *cut) for cut in cuts)
            if not cuts:
                bounds.update(_nearest_end(number, place, weights[number]) for place in places)
    pairs = pairwise(sorted(bounds))
    return tuple(Partition(id, tuple(_slices(shards, first, last))) for id, (first, last) in enumerate(pairs))


def _weights(shards: Sequence[Shard], unit: str) -> list[float]:
    """Bytes or samples of each shard; the mean of the others where one is unknown, 1 where all are."""
    by_samples = unit == "samples" or all(shard.size is None for shard in shards)
    weights = [shard.samples if by_samples else shard.size for shard in shards]
    known = [weight for weight in weights if weight is not None]
    mean = sum(known) / len(known) if known else 1
    return [mean if weight is None else weight for weight in weights]


def _nearest_end(number: int, place: float, weight: float) -> tuple[int, int, int]:
    return number + (place > weight / 2), 0, 0


def _slices(shards: Sequence[Shard], first: tuple[int, int, int], last: tuple[int, int, int]) -> Iterator[Slice]:
    number, start, before = first
    while number < last[0]:
        total = shards[number].samples
        yield Slice(shards[number], start, None, None if total is None else max(total - before, 0))
        number, start, before = number + 1, 0, 0
    if last[1]:
        yield Slice(shards[number], start, last[1], last[2] - before)


def split_folder(folder: Shard, places: Sequence[float]) -> list[Cut]:
    """A folder can be cut before any sample but the first."""
    cuts = {min(max(round(place), 1), (folder.samples or 1) - 1) for place in places}
    return [(cut, cut) for cut in sorted(cuts) if cut > 0]


def nearest(axis: Sequence[int], place: float) -> int:
    after = min(bisect_left(axis, place), len(axis) - 1)
    return after - (after > 0 and place - axis[after - 1] < axis[after] - place)
