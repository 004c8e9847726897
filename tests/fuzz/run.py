"""Embeds mutated tars, and proves that every sample is a row or a failure: `python -m tests.fuzz.run 10000 [SEED]`.

Tars are embedded a hundred at a time, and `verify --deep` reads them again. It prints how many samples became rows and
failures, the slowest tar, and the peak memory. It stops at the first traceback, at a tar that takes over ten seconds,
and at a sum that does not hold; the tar lies then in a folder that it names.
"""

from __future__ import annotations

import itertools
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_batch.config import EmbedConfig, PlanConfig
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.embed import embed
from clip_batch.embeddings.verify import verify_output
from clip_batch.plan.plan import make_plan
from clip_batch.samples import read_slice
from clip_batch.storage.store import Store
from clip_batch.types import Shard, Slice
from tests import corpus
from tests.fuzz import mutate

SECONDS = 10.0
"""The longest that one tar may take."""

MEMORY = 2 * 2**30
"""The most bytes that the process may take."""

AT_ONCE = 100


@dataclass
class Result:
    """What became of `tars` mutated tars."""

    tars: int = 0
    rows: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    peak: int = 0

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.failures.most_common())
        return (
            f"{self.tars:,} mutated tars: {self.rows:,} rows, failures: {reasons}; "
            f"slowest {self.slowest:.2f} s, peak memory {self.peak / 2**20:,.0f} MiB"
        )


def fuzz(folder: Path, seed: int, count: int) -> Result:
    """Embed `count` mutated tars in `folder`; AssertionError where a promise does not hold."""
    result = Result()
    tars = enumerate(mutate.tars(seed, count))
    while batch := list(itertools.islice(tars, AT_ONCE)):
        place = folder / f"{batch[0][0]:06d}"
        place.mkdir()
        paths = [place / f"{number:06d}.tar" for number, _ in batch]
        for path, (_, content) in zip(paths, batch, strict=True):
            path.write_bytes(content)
            result.slowest = max(result.slowest, _read(path))
        _embed(place, paths, result)
        for path in paths:
            path.unlink()
    result.peak = peak()
    assert result.slowest < SECONDS, f"a tar took {result.slowest:.1f} s"
    assert result.peak < MEMORY, f"{result.peak:,} bytes of memory"
    return result


def peak() -> int:
    """The most bytes that this process has taken; `getrusage` counts those of the process that started it, too."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def _read(path: Path) -> float:
    """Read one tar, with a bound on the time; the seconds that it took."""
    signal.signal(signal.SIGALRM, _too_slow(path))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    started = time.perf_counter()
    for _ in read_slice(Slice(Shard(str(path))), corpus.plan_of()):
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    return time.perf_counter() - started


def _too_slow(path: Path) -> Any:
    def stop(*_: object) -> None:
        raise AssertionError(f"{path} takes over {SECONDS} s")

    return stop


def _embed(place: Path, paths: list[Path], result: Result) -> None:
    """Plan, embed and verify some tars, and add what became of them to the result."""
    out = str(place / "out")
    good = corpus.good_tar(str(place / "good.tar"), 1)  # so that there is a tar, whatever the others have become
    signal.signal(signal.SIGALRM, _too_slow(place))
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
    make_plan([good, *map(str, paths)], out, PlanConfig(model="fake:8", partition_samples=100))
    outcomes = embed(out, EmbedConfig(device="cpu", max_pixels=1_000_000))
    assert [outcome.state for outcome in outcomes] == ["committed"] * len(outcomes), outcomes
    report = verify_output(Store(out), deep=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert report.ok, f"{place}: {report.problems}"
    for commit in read_commits(Store(out)).values():
        for url, counts in commit.shards.items():
            assert counts["seen"] == counts["embedded"] + counts["failed"], f"{url}: {counts}"
        result.rows += commit.rows
        result.failures.update(commit.failed)
    result.rows -= 1
    result.tars += len(paths)


def main() -> None:
    """Run in a folder of its own, which is kept where something is wrong."""
    count, seed = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (int(sys.argv[1]), 0)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    print(fuzz(folder, seed, count))


if __name__ == "__main__":
    main()
