"""Tar samples a second, one core: ours against webdataset and tarfile, in one run; as JSON.

    python tests/bench/tar.py [--samples 20000] [--rounds 5]

Each sample has an 8 kB image, a caption and a JSON side-car. Best of the rounds, interleaved.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable

from clip_batch.samples import read_slice
from clip_batch.types import EncoderSpec, Plan, Shard, Slice


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    readers: dict[str, Callable[[str], int]] = {"ours": ours, "tarfile": standard, "webdataset": webdataset}
    best = dict.fromkeys(readers, float("inf"))
    with tempfile.TemporaryDirectory() as home:
        write(f"{home}/a.tar", arguments.samples)
        for _ in range(arguments.rounds):
            for name, reader in readers.items():
                started = time.perf_counter()
                assert reader(f"{home}/a.tar") == arguments.samples
                best[name] = min(best[name], time.perf_counter() - started)
    rates = {name: round(arguments.samples / seconds) for name, seconds in best.items()}
    ratio = round(best["webdataset"] / best["ours"], 1)
    print(json.dumps({"benchmark": "tar", "samples_per_second": rates, "over_webdataset": ratio}))


if __name__ == "__main__":
    main()
