"""Calibrate: what bounds `embed` on this machine, measured on the plan's own samples and model, and what to set.

Each step of embed's pipeline is timed by itself. On a GPU the steps run beside each other, so the
slowest counts; on a CPU decoding and the model share the cores, so their costs add up. Nothing is written.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil, floor, inf, log10
from statistics import median
from typing import TYPE_CHECKING

from clip_batch import encoders
from clip_batch.config import EmbedConfig, StorageConfig, parse_bytes
from clip_batch.encoders.device import cores, pick_device, torch_threads, use_torch_threads
from clip_batch.errors import DecodeError, EncoderError, InputError, one_line
from clip_batch.plan.plan import load_plan
from clip_batch.samples import read_slice
from clip_batch.samples.decode import JPEGS, decode_caption, read_header
from clip_batch.samples.prefetch import Prefetcher
from clip_batch.storage.store import Store
from clip_batch.types import Failure, Plan, Sample, Slice

if TYPE_CHECKING:
    from clip_batch.encoders.encoder import Encoder, Pixels

SAMPLES = 512
"""Samples that are decoded, at the most."""

SLICES = 8
"""Slices of the plan that they are taken from, spread over it."""

SLICE_BYTES = 32 * 2**20
"""Bytes that are read of each, from its start."""

SECONDS = 20.0
"""After so many no further slice is read; nor is a larger batch tried that would end later."""

DECODE_SECONDS = 5.0
"""Of decoding, on one thread and again on all."""

PASS_SECONDS = 0.5
"""Passes of one batch size, two at least; the fastest counts."""

BATCHES = {"cpu": (8, 16, 32, 64), "cuda": (64, 128, 256, 512, 1024)}

GAIN = 1.05
"""A larger batch must be so much faster, or the smaller one is taken."""

LEAST, MOST = 120.0, 600.0
"""Seconds that a partition should take: less is bookkeeping, more is much to lose to a preemption."""

SHARE = 0.01
"""Of all that one worker does, which a partition should not exceed: the last to end keeps the others waiting."""

LARGE = 1000
"""Pixels of a JPEG's shorter side from which on `--preprocess scaled` decodes less of it, for the usual models."""

FAR = 2
"""The plan's partitions are far from what they should be when they take so many times more or less."""

MEND = {
    "read": "a store nearer or faster, or workers on more nodes, would help",
    "decode": "more cores a worker would help",
    "model": "a faster device, or more of them, would help",
}


@dataclass(frozen=True)
class Measured:
    """What was measured on `samples` samples, `bad_share` of which (0 to 1) cannot be embedded.

    `sample_bytes` is a sample's mean size in its tar. Rates are samples a second: `read` by one
    reader (`read_bytes`: bytes a second), `decode_one` on one thread, `decode_all` on `threads`.
    `ladder` has (batch size, image-caption pairs a second). `broken_slices` are
    damaged and had no sample at all. `side` is the median of the images' shorter sides in pixels, 0 of what is no JPEG.
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
    """What follows: `bound` is "read", "decode" or "model", `rate` the samples a second to expect of embed.

    `cpus_per_gpu` is None without a GPU. The partition that is advised is told in samples, bytes of
    tar and seconds; `planned_seconds` is what the plan's own take on average, which is "fine",
    "small" or "large". `planned_samples` and the `hours` of one worker are None (and the partitions
    "unknown") where neither counts nor sizes of the input are known.
    """

    bound: str
    rate: float
    threads: int
    batch_size: int
    cpus_per_gpu: int | None
    partition_samples: int
    partition_bytes: int
    partition_seconds: float
    planned_samples: int | None
    planned_seconds: float | None
    planned_partitions: str
    hours: float | None


@dataclass(frozen=True)
class Calibration:
    """What was measured and what follows, for a plan of this `format` and way to `preprocess`."""

    format: str
    preprocess: str
    measured: Measured
    advice: Advice


def calibrate(
    output: str,
    config: EmbedConfig = EmbedConfig(),
    storage: StorageConfig = StorageConfig(),
    workers: int = 1,
    encoder: Encoder | None = None,
) -> Calibration:
    """Measure the steps of `embed` on this machine, for a plan that `workers` will share.

    Takes some 20 seconds for reading, 10 for decoding and 20 for the model, at the most, where
    nothing hangs. `encoder` is the plan's, where the process has loaded it already. PlanError: there
    is no plan. EncoderError: its model cannot be had, or fails. InputError: a tar is missing or
    changed, or no sample can be read or decoded; OSError: the store does not answer.
    """
    plan = load_plan(Store(output, storage.storage_options))
    started = time.perf_counter()
    encoder = encoder or encoders.load(plan.encoder, config.device, storage.storage_options)
    load_seconds = time.perf_counter() - started
    device = pick_device(config.device)
    threads = config.threads or cores()
    taken = _read(plan, config, storage)
    if not taken.samples:
        raise InputError(f"no slice that was tried has a sample: {taken.trouble}; mend the input")
    team = torch_threads()
    try:
        _, decode_one = _decode(encoder, taken.samples, 1, config.max_pixels)
        decoded, decode_all = _decode(encoder, taken.samples, threads, config.max_pixels)
    finally:
        use_torch_threads(team)
    good = [(one, decode_caption(sample.caption)[0]) for sample, one in decoded if not isinstance(one, DecodeError)]
    if not good:
        sample, error = decoded[0]
        raise InputError(f"none of {len(decoded)} images can be decoded, such as {sample.key}: {error}; look at them")
    measured = Measured(
        device=device,
        threads=threads,
        samples=len(taken.samples),
        bad_share=1 - (1 - taken.bad / taken.seen) * len(good) / len(decoded),
        broken_slices=taken.broken,
        sample_bytes=taken.bytes / taken.seen,
        read=taken.seen / taken.seconds,
        read_bytes=taken.bytes / taken.seconds,
        decode_one=decode_one,
        decode_all=decode_all,
        ladder=_climb(encoder, good, BATCHES["cpu" if device == "cpu" else "cuda"]),
        load_seconds=load_seconds,
        side=median(_side(sample, config.max_pixels) for sample, one in decoded if not isinstance(one, DecodeError)),
    )
    planned = planned_samples(plan, measured.sample_bytes)
    advice = advise(measured, planned, len(plan.partitions), workers)
    return Calibration(plan.format, plan.encoder.preprocess, measured, advice)


@dataclass
class _Taken:
    """What reading gave: samples in memory, of `seen` that were read, and what it took."""

    samples: list[Sample]
    seen: int = 0
    bad: int = 0
    broken: int = 0
    bytes: int = 0
    seconds: float = 1e-9
    trouble: str = "they are empty"
    """Of the last shard that is not what it should be."""


def _read(plan: Plan, config: EmbedConfig, storage: StorageConfig) -> _Taken:
    planned, taken = _spread(plan), _Taken([])
    keep = SAMPLES // len(planned)
    pieces = [_short(piece, plan.format, keep) for piece in planned]
    with Prefetcher(pieces, storage.storage_options, parse_bytes(config.prefetch)) as files:
        for whole, piece in zip(planned, pieces, strict=True):
            items = read_slice(piece, plan, storage.storage_options, files)
            _read_piece(taken, items, piece.start, plan.format == "files", piece is not whole, keep)
            if taken.seconds > SECONDS:
                break
    return taken


def _spread(plan: Plan) -> list[Slice]:
    """One slice of each of SLICES equal stretches of the plan, drawn by a fixed seed."""
    slices = [piece for partition in plan.partitions for piece in partition.slices]
    count, draw = min(SLICES, len(slices)), random.Random(0)
    places = [draw.randrange(k * len(slices) // count, (k + 1) * len(slices) // count) for k in range(count)]
    return [slices[place] for place in places]


def _short(piece: Slice, format: str, samples: int) -> Slice:
    """The first bytes of a slice, or of a folder's the first samples; the slice itself where it has no more."""
    end = piece.stop if piece.stop is not None else (piece.shard.samples if format == "files" else piece.shard.size)
    most = piece.start + (samples if format == "files" else SLICE_BYTES)
    return piece if end is None or end <= most else replace(piece, stop=most)


def _read_piece(
    taken: _Taken, items: Iterable[Sample | Failure], start: int, listed: bool, cut: bool, keep: int
) -> None:
    """Read a slice's items, every byte of their images, and keep the first samples.

    `start` is the slice's first byte; `listed`: its folder is listed before the first; `cut`: it was cut short.
    """
    seen, end, content, damaged = 0, start, 0, False
    failure: Failure | None = None
    started = time.perf_counter()
    for item in items:
        if isinstance(item, Failure):
            if item.key is None:
                taken.trouble, damaged = f"{item.shard}: {item.message}", True
                continue
            failure = item
            taken.bad += 1
        else:
            failure = None
            item = item._replace(image=bytes(item.image or b""))  # read now: it is a view into a map
            end = max(end, (item.offset or 0) + (item.length or 0))
            content += sum(len(part or b"") for part in (item.image, item.caption, item.json))
            if seen < keep:
                taken.samples.append(item)
        if not seen and listed:
            started = time.perf_counter()  # that was for the whole slice, not for the few samples of it
        seen += 1
    taken.seconds += time.perf_counter() - started
    if failure and cut:  # the cut may have gone through it
        seen, taken.bad = seen - 1, taken.bad - 1
    taken.seen += seen
    taken.broken += damaged and not seen
    taken.bytes += end - start if end > start else content  # no offsets: files, or compressed


def _decode(
    encoder: Encoder, samples: Sequence[Sample], threads: int, max_pixels: int
) -> tuple[list[tuple[Sample, Pixels | DecodeError]], float]:
    """As many of the samples as there is time for, with their pixels, and images a second."""
    deadline = inf

    def one(sample: Sample) -> Pixels | DecodeError | None:
        if time.perf_counter() > deadline:
            return None
        try:
            return encoder.preprocess(sample.image or b"", max_pixels)
        except DecodeError as error:
            return error

    with ThreadPoolExecutor(threads, "decode", use_torch_threads, (1,)) as pool:
        list(pool.map(one, samples[:threads]))  # the threads are there before the clock starts
        started = time.perf_counter()
        deadline = started + DECODE_SECONDS
        found = list(pool.map(one, samples))
        seconds = time.perf_counter() - started
    decoded = [(sample, made) for sample, made in zip(samples, found, strict=True) if made is not None]
    return decoded, len(decoded) / seconds


def _side(sample: Sample, max_pixels: int) -> int:
    """The shorter side of a JPEG, 0 of another image."""
    image = read_header(sample.image or b"", max_pixels)
    return min(image.size) if image.format in JPEGS else 0


def _climb(
    encoder: Encoder, pairs: Sequence[tuple[Pixels, str | None]], sizes: Sequence[int]
) -> tuple[tuple[int, float], ...]:
    """Pairs a second of each batch size, as far as it grows with it, fits in memory and there is time."""
    rungs: list[tuple[int, float]] = []
    started = time.perf_counter()
    for size in sizes:
        before = rungs[-1][1] if rungs else 0.0
        if rungs and time.perf_counter() - started + 2 * size / before > SECONDS:
            break
        try:
            rungs.append((size, _pace(encoder, [pairs[number % len(pairs)] for number in range(size)])))
        except RuntimeError as error:
            if rungs and "out of memory" in str(error):
                break
            told = one_line(error, 200)
            raise EncoderError(f"the model fails on {size} images at once: {told}; try another --device") from None
        if rungs[-1][1] < GAIN * before:
            break
    return tuple(rungs)


def _pace(encoder: Encoder, pairs: Sequence[tuple[Pixels, str | None]]) -> float:
    import numpy as np

    fastest, passes, started = inf, 0, time.perf_counter()
    while passes < 2 or time.perf_counter() - started < PASS_SECONDS:
        begun = time.perf_counter()
        encoders.encode_pairs(encoder, np.stack([pixels for pixels, _ in pairs]), [caption for _, caption in pairs])
        fastest = min(fastest, time.perf_counter() - begun)
        passes += 1
    return len(pairs) / fastest


def planned_samples(plan: Plan, sample_bytes: float) -> float | None:
    """Samples of the plan: counted, or else from bytes; slices that tell neither count as the mean of the others."""
    counts: list[float] = []
    slices = [piece for partition in plan.partitions for piece in partition.slices]
    for piece in slices:
        end = piece.stop if piece.stop is not None else piece.shard.size
        if piece.samples is not None:
            counts.append(piece.samples)
        elif end is not None:
            counts.append((end - piece.start) / sample_bytes)
    return sum(counts) / len(counts) * len(slices) if counts else None


def advise(found: Measured, planned: float | None, partitions: int, workers: int = 1) -> Advice:
    """What follows of the figures for a plan of so many samples (None: unknown) and partitions, and its workers."""
    model = max(rate for _, rate in found.ladder)
    cpu = found.device == "cpu"
    together = 1 / (1 / found.decode_all + 1 / model) if cpu else min(found.decode_all, model)
    rate = min(found.read, together)
    bound = "read" if found.read < together else "decode" if found.decode_all < model else "model"
    feeding = ceil(round(model * found.threads / found.decode_all, 2))  # cores that decode as fast as the GPU encodes
    share = inf if planned is None else planned / rate / workers
    seconds = min(max(SHARE * share, LEAST), MOST, share)
    own = None if planned is None else planned / rate / partitions
    return Advice(
        bound=bound,
        rate=rate,
        threads=found.threads if cpu else feeding,
        batch_size=next(size for size, pace in found.ladder if GAIN * pace >= model),
        cpus_per_gpu=None if cpu else feeding + 1,
        partition_samples=_rounded(rate * seconds),
        partition_bytes=_rounded(rate * seconds * found.sample_bytes),
        partition_seconds=seconds,
        planned_samples=None if planned is None else round(planned),
        planned_seconds=own,
        planned_partitions=_judge(own, seconds),
        hours=None if planned is None else planned / rate / 3600,
    )


def _judge(own: float | None, advised: float) -> str:
    if own is None:
        return "unknown"
    if own > FAR * advised:
        return "large"
    return "small" if FAR * own < LEAST <= advised else "fine"  # of a plan of seconds any will do


def _rounded(value: float) -> int:
    """To two digits, 1 at the least."""
    return max(1, int(round(value, 1 - floor(log10(max(value, 1))))))


def describe(found: Calibration) -> str:
    """The same as text for people."""
    measured, advice = found.measured, found.advice
    ladder = ", ".join(f"{size}: {_figure(rate)}" for size, rate in measured.ladder)
    model = _figure(max(rate for _, rate in measured.ladder))
    lines = [
        f"{measured.samples:,} samples on {measured.device}, {measured.sample_bytes / 1e3:,.1f} kB each, "
        f"{measured.bad_share:.1%} bad; the model loads in {measured.load_seconds:.1f} s",
        f"read   {_figure(measured.read):>9} samples/s, {measured.read_bytes / 1e6:,.1f} MB/s, by one reader",
        f"decode {_figure(measured.decode_all):>9} images/s on {measured.threads} threads, "
        f"{_figure(measured.decode_one)} on one",
        f"model  {model:>9} pairs/s; by batch size {ladder}",
        f"embed  {_figure(advice.rate):>9} samples/s to be expected: it is {advice.bound}-bound; {MEND[advice.bound]}",
        f"take --batch-size {advice.batch_size} --threads {advice.threads}"
        + (f", and {advice.cpus_per_gpu} CPUs a GPU" if advice.cpus_per_gpu else ""),
        _describe_partitions(found),
    ]
    if measured.broken_slices:
        lines.insert(1, f"{measured.broken_slices} of the slices looked at are damaged and had no sample at all")
    if advice.bound == "decode" and found.preprocess == "fast" and measured.side >= LARGE:
        side = f"{measured.side:,.0f} pixels and more"
        lines.insert(-1, f"half of its images are JPEGs of {side}: planned with --preprocess scaled they decode sooner")
    if advice.hours is not None:
        unit = "hours" if measured.device == "cpu" else "GPU-hours"
        lines.append(f"in all {advice.planned_samples:,} samples: {advice.hours:,.3g} {unit} of one worker")
    return "\n".join(lines)


def _describe_partitions(found: Calibration) -> str:
    advice = found.advice
    flag = f"--partition-bytes {_size(advice.partition_bytes)}"
    if found.format == "files":
        flag = f"--partition-samples {advice.partition_samples}"
    wanted = f"some {_figure(advice.partition_seconds)} s, {advice.partition_samples:,} samples ({flag})"
    if advice.planned_seconds is None:
        return f"partitions should take {wanted}"
    own = f"partitions take {_figure(advice.planned_seconds)} s each"
    if advice.planned_partitions == "fine":
        return f"{own}, which is fine; ideal are {wanted}"
    return f"{own}, which is too {advice.planned_partitions}: plan into another --output, for {wanted}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(value: int) -> str:
    """Bytes as --partition-bytes takes them."""
    return next(
        (f"{value / unit:g}{name}" for unit, name in ((10**9, "GB"), (10**6, "MB")) if value >= unit), f"{value}"
    )
