"""How many partitions a plan has where no option says it: enough for many workers, none of them tiny."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

from clip_batch.plan.pack import PartitionTarget
from clip_batch.storage.paths import is_local
from clip_batch.types import Shard

PARTITIONS = 64
"""Partitions of a plan whose partitions keep `LEAST_SAMPLES` each: as many workers may share it."""

LEAST_SAMPLES = 256
"""Samples that a partition keeps: a start of a worker costs as much as some hundred of them."""

MOST_SAMPLES = 10_000
"""Samples of a partition of a folder of files at most."""

MOST_BYTES = 4 * 10**9
"""Bytes of a partition of tars or Parquet files at most."""


def automatic_target(shards: Sequence[Shard], format: str, sample_bytes: float) -> PartitionTarget:
    """The target that suits shards whose samples have `sample_bytes` bytes on average (0: that is not known).

    >>> automatic_target([Shard("a.tar", 10**9)] * 6, "tar", 10**5)
    PartitionTarget(unit='partitions', value=64)
    """
    if format == "files":
        samples = sum(shard.samples or 0 for shard in shards)
        return PartitionTarget("samples", max(1, ceil(samples / _count(samples, ceil(samples / MOST_SAMPLES)))))
    total = sum(shard.size or 0 for shard in shards)
    known = [shard.samples for shard in shards]
    samples = sum(filter(None, known)) if None not in known else int(total / sample_bytes) if sample_bytes else 0
    least = max(1, ceil(total / MOST_BYTES))
    count = _count(samples, least)
    if count <= least:
        return PartitionTarget("bytes", MOST_BYTES)
    if PARTITIONS // 2 <= len(shards) < count:  # whole shards do nearly as well, and no header is scanned
        count = max(len(shards), least)
    return PartitionTarget("partitions", count)


def _count(samples: int, least: int) -> int:
    return max(1, least, min(PARTITIONS, samples // LEAST_SAMPLES))


def affordable(places: Mapping[int, list[float]], shards: Sequence[Shard], format: str) -> dict[int, list[float]]:
    """The places to cut of an automatic target, without those whose search would read a remote tar as a whole.

    A tar that is larger than a partition may be is cut in any case.
    """
    return {
        number: inside
        for number, inside in places.items()
        if format != "tar" or is_local(shards[number].url) or (shards[number].size or 0) > MOST_BYTES
    }
