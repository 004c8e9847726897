"""calibrate: measures on this machine what bounds `embed`, with samples and the model of a plan; writes nothing.

Each step of embed's pipeline is timed by itself. On a GPU the steps run at the same time, so the slowest one is the
bound; on a CPU decoding and the model share the cores, so their costs add up. See `advice` for what follows.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import inf
from statistics import median
from typing import TYPE_CHECKING

from clip_batch import encoders
from clip_batch.config import EmbedConfig, StorageConfig, parse_bytes
from clip_batch.embeddings.advice import GAIN, Advice, Measured, advise, planned_samples
from clip_batch.embeddings.loading import are_many, load_encoder
from clip_batch.encoders.device import cores, pick_device, torch_threads, use_torch_threads
from clip_batch.errors import DecodeError, EncoderError, InputError, one_line
from clip_batch.plan.plan import load_plan
from clip_batch.samples import read_slice
from clip_batch.samples.decode import JPEGS, read_header
from clip_batch.samples.prefetch import Prefetcher
from clip_batch.samples.texts import decode_texts
from clip_batch.storage.store import Store
from clip_batch.types import Failure, Item, PassedOver, Plan, Sample, Slice

if TYPE_CHECKING:
    from clip_batch.encoders.encoder import Model, Pixels

SAMPLES = 512
"""The most samples that are decoded."""

SLICES = 8
"""Slices that the samples are taken from, spread over the plan."""

SLICE_BYTES = 32 * 2**20
"""Bytes that are read from the start of each slice."""

SECONDS = 20.0
"""No further slice is read after this many seconds, and no larger batch is tried that would take longer."""

DECODE_SECONDS = 5.0
"""Seconds of decoding on one thread, and again on all."""

PASS_SECONDS = 0.5
"""Seconds of passes of one batch size; there are at least two, and the fastest counts."""

BATCHES = {"cpu": (8, 16, 32, 64), "cuda": (64, 128, 256, 512, 1024)}
"""The batch sizes to try on each device, the smallest first."""


@dataclass(frozen=True)
class Calibration:
    """The measurements and the advice for a plan of this `format` and `preprocess`."""

    format: str
    preprocess: str
    measured: Measured
    advice: Advice


def calibrate(
    output: str,
    config: EmbedConfig = EmbedConfig(),
    storage: StorageConfig = StorageConfig(),
    workers: int = 1,
    encoder: Model | None = None,
) -> Calibration:
    """Measure the steps of `embed` on this machine, for a plan that `workers` will share.

    Takes at most some 20 seconds for reading, 10 for decoding and 20 for the model. `encoder` is the plan's, if the
    process has loaded it already. PlanError: there is no plan. EncoderError: its model cannot be loaded, or fails.
    InputError: a tar is missing or changed, or no sample can be read or decoded. OSError: the store does not answer.
    """
    plan = load_plan(Store(output, storage.storage_options))
    started = time.perf_counter()
    encoder = encoder or load_encoder(
        plan.encoder, config, storage.storage_options, are_many(plan, list(plan.partitions))
    )
    load_seconds = time.perf_counter() - started
    device = pick_device(config.device)
    threads = config.threads or cores()
    read = _read(plan, config, storage)
    if not read.samples:
        raise InputError(f"no slice that was tried has a sample: {read.trouble}; mend the input")
    forward_threads = torch_threads()
    try:
        _, decode_one = _decode(encoder, read.samples, 1, config.max_pixels)
        decoded, decode_all = _decode(encoder, read.samples, threads, config.max_pixels)
    finally:
        use_torch_threads(forward_threads)
    pairs = [
        (pixels, decode_texts(sample, plan.caption_field).caption)
        for sample, pixels in decoded
        if not isinstance(pixels, DecodeError)
    ]
    if not pairs:
        sample, error = decoded[0]
        raise InputError(f"none of {len(decoded)} images can be decoded, such as {sample.key}: {error}; look at them")
    measured = Measured(
        device=device,
        threads=threads,
        samples=len(read.samples),
        bad_share=1 - (1 - read.bad / read.seen) * len(pairs) / len(decoded),
        broken_slices=read.broken,
        sample_bytes=read.bytes / read.seen,
        read=read.seen / read.seconds,
        read_bytes=read.bytes / read.seconds,
        decode_one=decode_one,
        decode_all=decode_all,
        ladder=_climb(encoder, pairs, BATCHES["cpu" if device == "cpu" else "cuda"]),
        load_seconds=load_seconds,
        side=median(
            _side(sample, config.max_pixels) for sample, pixels in decoded if not isinstance(pixels, DecodeError)
        ),
    )
    planned = planned_samples(plan, measured.sample_bytes)
    advice = advise(measured, planned, len(plan.partitions), workers)
    return Calibration(plan.format, plan.encoder.preprocess, measured, advice)


@dataclass
class _Read:
    """The result of reading: some samples in memory; the number of samples `seen`, and their bytes and seconds."""

    samples: list[Sample]
    seen: int = 0
    bad: int = 0
    broken: int = 0
    bytes: int = 0
    seconds: float = 1e-9
    trouble: str = "they are empty"
    """The error of the last shard that is broken."""


def _read(plan: Plan, config: EmbedConfig, storage: StorageConfig) -> _Read:
    slices, read = _spread(plan), _Read([])
    keep = SAMPLES // len(slices)
    pieces = [_short(piece, plan.format, keep) for piece in slices]
    with Prefetcher(pieces, storage.storage_options, parse_bytes(config.prefetch)) as files:
        for whole, piece in zip(slices, pieces, strict=True):
            items = read_slice(piece, plan, storage.storage_options, files)
            _read_piece(read, items, piece.start, plan.format == "files", piece is not whole, keep)
            if read.seconds > SECONDS:
                break
    return read


def _spread(plan: Plan) -> list[Slice]:
    """One slice from each of SLICES equal stretches of the plan, drawn with a fixed seed."""
    slices = [piece for partition in plan.partitions for piece in partition.slices]
    count, draw = min(SLICES, len(slices)), random.Random(0)
    places = [draw.randrange(k * len(slices) // count, (k + 1) * len(slices) // count) for k in range(count)]
    return [slices[place] for place in places]


def _short(piece: Slice, format: str, samples: int) -> Slice:
    """The first SLICE_BYTES of a slice, or the first `samples` of a folder's; a shorter slice is returned as it is."""
    end = piece.stop if piece.stop is not None else (piece.shard.samples if format == "files" else piece.shard.size)
    most = piece.start + (samples if format == "files" else SLICE_BYTES)
    return piece if end is None or end <= most else replace(piece, stop=most)


def _read_piece(read: _Read, items: Iterable[Item], start: int, listed: bool, cut: bool, keep: int) -> None:
    """Read the items of a slice, with every byte of their images, and keep the first `keep` samples.

    `start` is the slice's first byte. `listed` says that its folder is listed before the first item, and `cut` that
    the slice was cut short by `_short`.
    """
    seen, end, content, damaged = 0, start, 0, False
    failure: Failure | None = None
    started = time.perf_counter()
    for item in items:
        if isinstance(item, PassedOver):
            continue
        if isinstance(item, Failure):
            if item.key is None:
                read.trouble, damaged = f"{item.shard}: {item.message}", True
                continue
            failure = item
            read.bad += 1
        else:
            failure = None
            item = item._replace(image=bytes(item.image or b""))  # reads the bytes, as it is a view of a memory map
            end = max(end, (item.offset or 0) + (item.length or 0))
            content += sum(len(part or b"") for part in (item.image, item.caption, item.json))
            if seen < keep:
                read.samples.append(item)
        if not seen and listed:
            started = time.perf_counter()  # the listing was for the whole slice, not for these few samples
        seen += 1
    read.seconds += time.perf_counter() - started
    if failure and cut:  # the last sample may have been cut in two
        seen, read.bad = seen - 1, read.bad - 1
    read.seen += seen
    read.broken += damaged and not seen
    read.bytes += end - start if end > start else content  # files and compressed tars have no offsets


def _decode(
    encoder: Model, samples: Sequence[Sample], threads: int, max_pixels: int
) -> tuple[list[tuple[Sample, Pixels | DecodeError]], float]:
    """The samples that there is time to decode, each with its pixels or its error, and the images a second."""
    deadline = inf

    def decode(sample: Sample) -> Pixels | DecodeError | None:
        if time.perf_counter() > deadline:
            return None
        try:
            return encoder.preprocess(sample.image or b"", max_pixels)
        except DecodeError as error:
            return error

    with ThreadPoolExecutor(threads, "decode", use_torch_threads, (1,)) as pool:
        list(pool.map(decode, samples[:threads]))  # starts the threads before the clock
        started = time.perf_counter()
        deadline = started + DECODE_SECONDS
        results = list(pool.map(decode, samples))
        seconds = time.perf_counter() - started
    decoded = [(sample, result) for sample, result in zip(samples, results, strict=True) if result is not None]
    return decoded, len(decoded) / seconds


def _side(sample: Sample, max_pixels: int) -> int:
    """The shorter side of a JPEG in pixels; 0 for other images."""
    image = read_header(sample.image or b"", max_pixels)
    return min(image.size) if image.format in JPEGS else 0


def _climb(
    encoder: Model, pairs: Sequence[tuple[Pixels, str | None]], sizes: Sequence[int]
) -> tuple[tuple[int, float], ...]:
    """Pairs a second of each batch size, until it grows no more, memory is full or the time is up."""
    rungs: list[tuple[int, float]] = []
    started = time.perf_counter()
    for size in sizes:
        previous = rungs[-1][1] if rungs else 0.0
        if rungs and time.perf_counter() - started + 2 * size / previous > SECONDS:
            break
        try:
            rungs.append((size, _pace(encoder, [pairs[number % len(pairs)] for number in range(size)])))
        except RuntimeError as error:
            if rungs and "out of memory" in str(error):
                break
            reason = one_line(error, 200)
            raise EncoderError(f"the model fails on {size} images at once: {reason}; try another --device") from None
        if rungs[-1][1] < GAIN * previous:
            break
    return tuple(rungs)


def _pace(encoder: Model, pairs: Sequence[tuple[Pixels, str | None]]) -> float:
    """Pairs a second of the fastest forward pass of one batch."""
    import numpy as np

    fastest, passes, started = inf, 0, time.perf_counter()
    while passes < 2 or time.perf_counter() - started < PASS_SECONDS:
        begun = time.perf_counter()
        encoders.encode_pairs(encoder, np.stack([pixels for pixels, _ in pairs]), [caption for _, caption in pairs])
        fastest = min(fastest, time.perf_counter() - begun)
        passes += 1
    return len(pairs) / fastest
