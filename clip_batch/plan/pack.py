"""Packs shards into partitions. Pure: nothing is read, and equal arguments give equal partitions.

Of a total of T and n = ceil(T / target) partitions, partition k should end at k * T / n. An end moves to the nearest
end of a shard, so a partition is off T / n by less than one shard. Only a shard larger than a partition should be
cut inside: `places_to_cut` says where, `clip_batch.plan.cuts` finds the cuts nearest to these places, and `pack` ends
partitions there. Ends that meet become one, so shards that cannot be cut may make fewer than n partitions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from math import ceil
from typing import Literal, NamedTuple

from clip_batch.errors import ConfigError
from clip_batch.types import Partition, Shard, Slice

MOST_PARTITIONS = 1_000_000

NEARLY_EQUAL = 1.1
"""With a target of n partitions, a shard up to this many times T / n is not cut: that would cost a header scan."""


class PartitionTarget(NamedTuple):
    """How many bytes or samples one partition should have, or how many partitions there should be."""

    unit: Literal["bytes", "samples", "partitions", "auto"]
    """With "auto", which `pack` does not take, the value is the number of partitions that a plan got."""
    value: int

    def __str__(self) -> str:
        if self.unit == "auto":
            return "auto"
        return f"{self.value:,} {self.unit}" + ("" if self.unit == "partitions" else " a partition")


class Cut(NamedTuple):
    """A place between two samples of a shard: its byte in a tar, or the sample's number in a folder of files."""

    at: int
    samples: int
    """Samples of the shard before it."""


class _End(NamedTuple):
    """Where a partition ends: before a shard (at 0), or inside it."""

    shard: int
    at: int = 0
    samples: int = 0


def places_to_cut(shards: Sequence[Shard], target: PartitionTarget) -> dict[int, list[float]]:
    """The places inside shards larger than a partition where partitions should end, by the shard's number.

    Places count from the shard's start, in samples for a target of samples, else in bytes (in samples where no shard
    has a size). ConfigError: the target makes too many partitions.
    """
    weights = _weights(shards, target)
    count = _count(weights, target)
    largest = NEARLY_EQUAL * sum(weights) / count if target.unit == "partitions" else target.value
    places: dict[int, list[float]] = {}
    for number, place in _ideal_ends(weights, count):
        if weights[number] > largest:
            places.setdefault(number, []).append(place)
    return places


def pack(
    shards: Sequence[Shard], target: PartitionTarget, cuts: Mapping[int, Sequence[Cut]] | None = None
) -> tuple[Partition, ...]:
    """Pack shards into partitions, in order: each shard once, or as slices that tile it.

    `cuts` has, by the number of a shard, the ends of partitions inside it. ConfigError: too many partitions.

    >>> shards = [Shard("a", 10), Shard("b", 5), Shard("c", 5)]
    >>> [len(partition.slices) for partition in pack(shards, PartitionTarget("bytes", 10))]
    [1, 2]
    """
    cuts = cuts or {}
    weights = _weights(shards, target)
    ends = {_End(0), _End(len(shards))}
    for number, place in _ideal_ends(weights, _count(weights, target)):
        if number not in cuts:
            ends.add(_End(number + (place > weights[number] / 2)))
    ends.update(_End(number, *cut) for number, inside in cuts.items() for cut in inside)
    pairs = pairwise(sorted(ends))
    return tuple(Partition(id, tuple(_slices(shards, first, last))) for id, (first, last) in enumerate(pairs))


def _weights(shards: Sequence[Shard], target: PartitionTarget) -> list[float]:
    """Bytes or samples of each shard; the mean of the others where one is unknown, 1 where all are."""
    by_samples = target.unit == "samples" or all(shard.size is None for shard in shards)
    weights = [shard.samples if by_samples else shard.size for shard in shards]
    known = [weight for weight in weights if weight is not None]
    mean = sum(known) / len(known) if known else 1
    return [mean if weight is None else weight for weight in weights]


def _count(weights: Sequence[float], target: PartitionTarget) -> int:
    """The number n of partitions."""
    count = target.value if target.unit == "partitions" else max(1, ceil(sum(weights) / target.value))
    if count > MOST_PARTITIONS:
        raise ConfigError(f"{count:,} partitions are over {MOST_PARTITIONS:,}: raise the partition target")
    return count


def _ideal_ends(weights: Sequence[float], count: int) -> Iterator[tuple[int, float]]:
    """The ends at k * T / n: the number of the shard that each lies in, and its place from the shard's start."""
    ends = list(accumulate(weights))
    total = ends[-1]
    for k in range(1, count):
        number = min(bisect_right(ends, total * k / count), len(ends) - 1)
        yield number, total * k / count - (ends[number] - weights[number])


def _slices(shards: Sequence[Shard], first: _End, last: _End) -> Iterator[Slice]:
    """What lies between two ends."""
    number, start, before = first
    while number < last.shard:
        total = shards[number].samples
        yield Slice(shards[number], start, None, None if total is None else max(total - before, 0))
        number, start, before = number + 1, 0, 0
    if last.at:
        yield Slice(shards[number], start, last.at, last.samples - before)
