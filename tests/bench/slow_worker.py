"""Measures the wall clock of four workers of which one is four times slower, over the ideal one.

    python -m tests.bench.slow_worker [--tars 32] [--samples 1000] [--partition 250] [--rate 200] [--record]

There are four processes with a slot each. Their encoders only sleep, so that they do not compete for cores. The ideal
time is all samples over the sum of the four rates.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time

from clip_batch.config import EmbedConfig, PlanConfig
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.embed import embed
from clip_batch.embeddings.slots import Slot, partitions
from clip_batch.embeddings.workers import WorkerRun, read_records
from clip_batch.plan.plan import make_plan
from clip_batch.storage.store import Store
from tests.bench import result
from tests.bench.data_path import write_tars
from tests.bench.embed import BATCH, Stub

WORKERS, SLOWER = 4, 4


def work(out: str, slot: int, rate: float, share: bool, start: object) -> None:
    from clip_batch.encoders.device import use_torch_threads

    use_torch_threads(1)
    encoder, own = Stub(rate, "fast"), Slot(slot, WORKERS)
    start.wait()  # type: ignore[attr-defined]
    config = EmbedConfig(batch_size=BATCH, threads=1, device="cpu", share=share)
    embed(out, config, partitions(Store(out), own), run=WorkerRun(slot=own), encoder=encoder)


def wall(tars: list[str], out: str, samples: int, rates: list[float], share: bool) -> tuple[float, int]:
    """Seconds from the start to the last commit; samples that were computed."""
    plan = make_plan(tars, out, PlanConfig(model="fake:512", partition_samples=samples))
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(WORKERS + 1)
    processes = [context.Process(target=work, args=(out, slot, rate, share, start)) for slot, rate in enumerate(rates)]
    for process in processes:
        process.start()
    start.wait()
    began = time.time()
    for process in processes:
        process.join()
    commits = read_commits(Store(out))
    assert len(commits) == len(plan.partitions), "not all is committed"
    seconds = max(commit.finished for commit in commits.values()) - began
    computed = sum(record.samples for record in read_records(Store(out)))
    return seconds, computed


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--tars", type=int, default=32)
    parser.add_argument("--samples", type=int, default=1000, help="a tar")
    parser.add_argument("--partition", type=int, default=250, help="samples of a partition")
    parser.add_argument("--rate", type=float, default=200, help="images a second of a worker that is not slow")
    options = parser.parse_args()
    rates = [options.rate / SLOWER] + [options.rate] * (WORKERS - 1)
    total = options.tars * options.samples
    ideal = total / sum(rates)
    found = {}
    with tempfile.TemporaryDirectory() as home:
        tars = write_tars(home, options.tars, options.samples)
        for share in (True, False):
            seconds, computed = wall(tars, f"{home}/out-{share}", options.partition, rates, share)
            name = "share" if share else "no_share"
            found[name] = {"seconds": round(seconds, 1), "over_ideal": round(seconds / ideal, 3)}
            found[name]["computed_in_vain"] = round(computed / total - 1, 4)
    cores = len(os.sched_getaffinity(0))
    share, alone = found["share"], found["no_share"]
    twice = f"{share['seconds']} s; {100 * share['computed_in_vain']:.1f} % computed twice"
    what = f"wall clock of {WORKERS} workers, one {SLOWER} times slower, over the ideal one ({twice})"
    ratio = round(alone["over_ideal"] / share["over_ideal"], 2)
    rows = [result.Row("share", what, "times", share["over_ideal"], alone["over_ideal"], "`--no-share`", ratio)]
    figures = {"cores": cores, "samples_in_all": total, "ideal": round(ideal, 1), **found}
    result.report("slow_worker", "embeddings", options, rows, figures)


if __name__ == "__main__":
    main()
