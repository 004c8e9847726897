"""Advice on how to run embed, from measurements: what bounds it, what to set, how large partitions should be."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, inf, log10
from typing import Literal

from clip_batch.types import Plan

GAIN = 1.05
"""A larger batch is advised only if it is this many times as fast."""

LEAST, MOST = 120.0, 600.0
"""Seconds that a partition should take. Shorter ones cost bookkeeping; a preemption loses much of a longer one."""

SHARE = 0.01
"""Largest fraction of a worker's total work that one partition should be: the last one keeps the others waiting."""

FAR = 2
"""The plan's partitions are called small or large if their time differs from the advised one by this factor."""

Bound = Literal["read", "decode", "model"]
"""The step of embed that limits its rate."""

SizeVerdict = Literal["fine", "small", "large", "unknown"]
"""What is said of the plan's partitions; "unknown" without counts or sizes of the input."""


@dataclass(frozen=True)
class Measured:
    """The measurements, on `samples` samples, of which the fraction `bad_share` cannot be embedded.

    `sample_bytes` is the mean size of a sample in its tar. Rates are in samples a second: `read` by one reader
    (`read_bytes` in bytes a second), `decode_one` on one thread, `decode_all` on `threads`. `ladder` has pairs of
    (batch size, image-caption pairs a second). `broken_slices` counts slices that are damaged and had no sample.
    `side` is the median of the images' shorter sides in pixels, counting images that are not JPEGs as 0.
    """

    device: str
    threads: int
    samples: int
    bad_share: float
    broken_slices: int
    sample_bytes: float
    read: float
    read_bytes: float
    decode_one: float
    decode_all: float
    ladder: tuple[tuple[int, float], ...]
    load_seconds: float
    side: float


@dataclass(frozen=True)
class Advice:
    """The advice: `bound` limits embed, and `rate` is the samples a second to expect of it.

    `cpus_per_gpu` is None without a GPU. The advised partition is given in samples, bytes of tar and seconds;
    `planned_seconds` is what the plan's partitions take on average, and `planned_partitions` the verdict on it.
    `planned_samples`, `planned_seconds` and the `hours` that one worker takes are None where neither counts nor sizes
    of the input are known.
    """

    bound: Bound
    rate: float
    threads: int
    batch_size: int
    cpus_per_gpu: int | None
    partition_samples: int
    partition_bytes: int
    partition_seconds: float
    planned_samples: int | None
    planned_seconds: float | None
    planned_partitions: SizeVerdict
    hours: float | None


def planned_samples(plan: Plan, sample_bytes: float) -> float | None:
    """The samples of the plan: counted, or estimated from bytes; None where no slice has either.

    Slices that have neither count as the mean of the others.
    """
    counts: list[float] = []
    slices = [piece for partition in plan.partitions for piece in partition.slices]
    for piece in slices:
        end = piece.stop if piece.stop is not None else piece.shard.size
        if piece.samples is not None:
            counts.append(piece.samples)
        elif end is not None:
            counts.append((end - piece.start) / sample_bytes)
    return sum(counts) / len(counts) * len(slices) if counts else None


def advise(measured: Measured, planned: float | None, partitions: int, workers: int = 1) -> Advice:
    """The advice for a plan of `planned` samples (None: unknown) in `partitions` partitions, shared by `workers`."""
    model = max(rate for _, rate in measured.ladder)
    cpu = measured.device == "cpu"
    together = 1 / (1 / measured.decode_all + 1 / model) if cpu else min(measured.decode_all, model)
    rate = min(measured.read, together)
    bound: Bound = "read" if measured.read < together else "decode" if measured.decode_all < model else "model"
    feeding = ceil(
        round(model * measured.threads / measured.decode_all, 2)
    )  # cores that decode as fast as the model encodes
    share = inf if planned is None else planned / rate / workers
    seconds = min(max(SHARE * share, LEAST), MOST, share)
    planned_seconds = None if planned is None else planned / rate / partitions
    return Advice(
        bound=bound,
        rate=rate,
        threads=measured.threads if cpu else feeding,
        batch_size=next(size for size, pace in measured.ladder if GAIN * pace >= model),
        cpus_per_gpu=None if cpu else feeding + 1,
        partition_samples=_rounded(rate * seconds),
        partition_bytes=_rounded(rate * seconds * measured.sample_bytes),
        partition_seconds=seconds,
        planned_samples=None if planned is None else round(planned),
        planned_seconds=planned_seconds,
        planned_partitions=_judge(planned_seconds, seconds),
        hours=None if planned is None else planned / rate / 3600,
    )


def _judge(planned: float | None, advised: float) -> SizeVerdict:
    """The verdict on partitions that take `planned` seconds where `advised` seconds are advised."""
    if planned is None:
        return "unknown"
    if planned > FAR * advised:
        return "large"
    return "small" if FAR * planned < LEAST <= advised else "fine"  # in a plan of seconds, any size is fine


def _rounded(value: float) -> int:
    """Round to two significant digits; at least 1."""
    return max(1, int(round(value, 1 - floor(log10(max(value, 1))))))
