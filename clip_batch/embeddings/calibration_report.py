"""The text that `doctor --calibrate` prints: what was measured, and what to set."""

from __future__ import annotations

from clip_batch.embeddings.advice import Bound
from clip_batch.embeddings.calibrate import Calibration

LARGE = 1000
"""A JPEG whose shorter side has this many pixels is decoded faster by `--preprocess scaled`, for the usual models."""

REMEDY: dict[Bound, str] = {
    "read": "a store nearer or faster, or workers on more nodes, would help",
    "decode": "more cores a worker would help",
    "model": "a faster device, or more of them, would help",
}


def describe(calibration: Calibration) -> str:
    """A calibration as text for people."""
    measured, advice = calibration.measured, calibration.advice
    ladder = ", ".join(f"{size}: {_figure(rate)}" for size, rate in measured.ladder)
    model = _figure(max(rate for _, rate in measured.ladder))
    lines = [
        f"{measured.samples:,} samples on {measured.device}, {measured.sample_bytes / 1e3:,.1f} kB each, "
        f"{measured.bad_share:.1%} bad; the model loads in {measured.load_seconds:.1f} s",
        f"read   {_figure(measured.read):>9} samples/s, {measured.read_bytes / 1e6:,.1f} MB/s, by one reader",
        f"decode {_figure(measured.decode_all):>9} images/s on {measured.threads} threads, "
        f"{_figure(measured.decode_one)} on one",
        f"model  {model:>9} pairs/s; by batch size {ladder}",
        f"embed  {_figure(advice.rate):>9} samples/s to be expected: "
        f"it is {advice.bound}-bound; {REMEDY[advice.bound]}",
        f"take --batch-size {advice.batch_size} --threads {advice.threads}"
        + (f", and {advice.cpus_per_gpu} CPUs a GPU" if advice.cpus_per_gpu else ""),
        _describe_partitions(calibration),
    ]
    if measured.broken_slices:
        lines.insert(1, f"{measured.broken_slices} of the slices looked at are damaged and had no sample at all")
    if advice.bound == "decode" and calibration.preprocess == "fast" and measured.side >= LARGE:
        side = f"{measured.side:,.0f} pixels and more"
        lines.insert(-1, f"half of its images are JPEGs of {side}: planned with --preprocess scaled they decode sooner")
    if advice.hours is not None:
        unit = "hours" if measured.device == "cpu" else "GPU-hours"
        lines.append(f"in all {advice.planned_samples:,} samples: {advice.hours:,.3g} {unit} of one worker")
    return "\n".join(lines)


def _describe_partitions(calibration: Calibration) -> str:
    """The advised size of partitions, and what the plan's take."""
    advice = calibration.advice
    flag = f"--partition-bytes {_size(advice.partition_bytes)}"
    if calibration.format == "files":
        flag = f"--partition-samples {advice.partition_samples}"
    advised = f"some {_figure(advice.partition_seconds)} s, {advice.partition_samples:,} samples ({flag})"
    if advice.planned_seconds is None:
        return f"partitions should take {advised}"
    planned = f"partitions take {_figure(advice.planned_seconds)} s each"
    if advice.planned_partitions == "fine":
        return f"{planned}, which is fine; ideal are {advised}"
    return f"{planned}, which is too {advice.planned_partitions}: plan into another --output, for {advised}"


def _figure(value: float) -> str:
    """A number with three significant digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(value: int) -> str:
    """A number of bytes as --partition-bytes takes it."""
    return next(
        (f"{value / unit:g}{name}" for unit, name in ((10**9, "GB"), (10**6, "MB")) if value >= unit), f"{value}"
    )
