"""Measures how many samples a second are read from a tar on one core, beside webdataset and tarfile.

    python -m tests.bench.tar [--samples 20000] [--rounds 5] [--record]

Each sample has an 8 kB image, a caption and a JSON side-car. Rounds are interleaved, and the best of each counts.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable

from clip_batch.samples import read_slice
from clip_batch.types import EncoderSpec, Plan, Shard, Slice
from tests.bench import result
from tests.bench.data_path import cpu_seconds


def write(path: str, samples: int) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(samples):
            for end, body in (
                ("jpg", b"\xff" * 8192),
                ("txt", b"a caption of some words"),
                ("json", b'{"width": 256}'),
            ):
                info = tarfile.TarInfo(f"{number:09d}.{end}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))


def ours(path: str) -> int:
    return sum(1 for _ in read_slice(Slice(Shard(path)), Plan((), EncoderSpec("fake:8", "", ""))))


def standard(path: str) -> int:
    with tarfile.open(path) as tar:
        return sum(1 for member in tar if tar.extractfile(member).read() and member.name.endswith("jpg"))  # type: ignore[union-attr]


def webdataset(path: str) -> int:
    import webdataset

    return sum(1 for _ in webdataset.WebDataset(path, shardshuffle=False))


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    readers: dict[str, Callable[[str], int]] = {"ours": ours, "tarfile": standard, "webdataset": webdataset}
    best, cpu = dict.fromkeys(readers, float("inf")), dict.fromkeys(readers, float("inf"))
    with tempfile.TemporaryDirectory() as home:
        write(f"{home}/a.tar", options.samples)
        for _ in range(options.rounds):
            for name, reader in readers.items():
                started, used = time.perf_counter(), cpu_seconds()
                assert reader(f"{home}/a.tar") == options.samples
                best[name] = min(best[name], time.perf_counter() - started)
                cpu[name] = min(cpu[name], cpu_seconds() - used)
    rates = {name: round(options.samples / seconds) for name, seconds in best.items()}
    cpu_ms = {name: round(1000 * seconds / options.samples, 4) for name, seconds in cpu.items()}
    rows = [
        result.Row(
            peer if peer != "webdataset" else "samples",
            "samples (8 kB image, caption, JSON) from a tar, one core",
            "samples/s",
            rates["ours"],
            rates[peer],
            peer,
            round(best[peer] / best["ours"], 1),
            12 if peer == "webdataset" else None,
            cpu_ms["ours"],
        )
        for peer in ("webdataset", "tarfile")
    ]
    result.report("tar", "samples", options, rows, {"samples_per_second": rates, "cpu_ms": cpu_ms})


if __name__ == "__main__":
    main()
