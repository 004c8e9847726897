"""Simulates LAION-5B: its real plan, worked off by a thousand simulated workers on a virtual clock.

    python -m tests.bench.laion [--tars 585000] [--gpus 1000] [--partition-bytes 1GB 2GB 4GB] [--record]

The plan (`make_plan` over a listing), the submissions and their slots, what a worker does next (embed's order of
partitions) and whom it helps (`spare.choose`) are real. Time and trouble are simulated, by `Cluster`: GPUs of several
speeds, slow nodes, nodes that die, workers that are killed, preemptions, time limits, SLURM's limit of tasks at a time,
tars that cannot be read at first. An operator submits again what is missing once the queue is empty.

For each size of partitions there is a run with workers that help each other and one without. Figures of a run: its wall
clock over the ideal one (all samples over all GPUs' rates), that of 99 % of the partitions, GPU time held over the
ideal, what was computed twice, how tasks ended, and the requests to storage.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import fsspec

from clip_batch.config import EmbedConfig, PlanConfig, SlurmConfig, StorageConfig, parse_bytes
from clip_batch.embeddings import spare, submission
from clip_batch.embeddings.partition_queue import PartitionQueue
from clip_batch.embeddings.workers import BEAT
from clip_batch.plan.plan import make_plan
from clip_batch.plan.state import SILENT
from clip_batch.storage.download import PIECE
from clip_batch.types import Partition, Plan
from tests.bench import result
from tests.bench.plan import Listing

Process = Iterator[float]

NODE = 8
"""GPUs in each node."""

HOUR = 3600.0

SCHEDULER = 60.0
"""Seconds between the times at which SLURM looks at its queue."""

SAMPLES_A_TAR = 10_000
BYTES_A_SAMPLE = 37_600
"""220 TB of 5.85 billion at 384 pixels: https://github.com/rom1504/img2dataset, dataset_examples/laion5B.md."""

PAGE = 1000
"""Names in one answer of S3 to a listing."""

A_PARTITION = {"HEAD": 3, "LIST": 3, "PUT": 4}
"""Requests to OUT for each partition, besides those for its tars; tests/docs/test_laion.py counts them on S3."""

A_TAR = {"HEAD": 1, "GET": math.ceil(SAMPLES_A_TAR * BYTES_A_SAMPLE / PIECE)}
"""Requests for each tar."""

LIST_SECONDS, GET_SECONDS = 0.1, 0.03
"""Assumed seconds of S3: for an answer to a listing, which come one after another; for a small GET, 32 at once."""

PRICES = {"HEAD": 0.4e-6, "GET": 0.4e-6, "PUT": 5e-6, "LIST": 5e-6}
"""Dollars for each request: S3 Standard, us-east-1."""


class Tars(Listing):
    """Tars of 10,000 samples whose sizes differ by a tenth, as those of real sets do."""

    protocol = "laion"

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        found = super().info(path)
        if found["type"] == "file":
            found["size"] = int(SAMPLES_A_TAR * BYTES_A_SAMPLE * (0.9 + 0.2 * (int(path[-11:-4]) * 7919 % 1009) / 1008))
        return found


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes of eight, and what goes wrong with them. Times are in seconds; lifetimes are exponential."""

    gpus: int = 1000
    rate: float = 312.0
    """Samples a second of one GPU."""
    spread: float = 0.05
    """Standard deviation of the logarithm of a node's speed."""
    slow_nodes: float = 0.05
    """Share of the nodes that are slow, by the factor `slower`."""
    slower: float = 4.0
    start: float = 90.0
    """Time from a task's start to its first sample: Python, plan, model."""
    node_life: float = 200 * HOUR
    """Mean lifetime of a node. It is then gone for good, which SLURM notices after `unseen`."""
    unseen: float = 300.0
    worker_life: float = 1000 * HOUR
    """Mean lifetime of a worker. One that dies by itself (memory) is a failed task, which nobody requeues."""
    preempted: float = 24 * HOUR
    """Mean time until a task is preempted; others then have its GPU for `taken`."""
    taken: float = HOUR
    requeue: float = 150.0
    """Time from a task's end until it may start again."""
    unreadable: float = 1e-4
    """Share of the partitions that fail in the first submission and are repaired before the second."""
    operator: float = HOUR / 2
    """Time until somebody sees that the queue is empty, and submits again."""


CALM: dict[str, Any] = {
    "spread": 0.0,
    "slow_nodes": 0.0,
    "unreadable": 0.0,
    **dict.fromkeys(("node_life", "worker_life", "preempted"), 1e12),
}
"""A cluster without trouble."""


@dataclass
class Worker:
    """A worker as its record shows it."""

    slot: int
    claims: dict[int, float] = field(default_factory=dict)
    """Partitions that it works on or has taken, and the time from which its record says so."""
    known: float = math.inf
    """Time until which others take it for alive."""
    looking: float = 0.0
    """Seconds that it last took to look for somebody to help."""


class Simulation:
    """One plan on one cluster, from the first submission to the last commit."""

    def __init__(self, plan: Plan, cluster: Cluster, slurm: SlurmConfig, share: bool, tasks: int = 0) -> None:
        self.cluster, self.slurm, self.share, self.tasks = cluster, slurm, share, tasks
        self.draw = random.Random(0)
        random.seed(0)  # the package's own draws
        self.partitions = plan.partitions
        self.bytes = [_bytes(partition) for partition in plan.partitions]
        self.ahead = max(1, round(parse_bytes(EmbedConfig().prefetch) * len(self.bytes) / sum(self.bytes)))
        nodes = range(cluster.gpus // NODE)
        slow = set(self.draw.sample(nodes, round(len(nodes) * cluster.slow_nodes)))
        speeds = [self.draw.lognormvariate(0, cluster.spread) / (cluster.slower if n in slow else 1) for n in nodes]
        self.rates = [cluster.rate * speed * BYTES_A_SAMPLE for speed in speeds]  # bytes of tars a second
        self.deaths = [self.draw.expovariate(1 / cluster.node_life) for _ in nodes]
        self.free = self.draw.sample(range(NODE * len(nodes)), NODE * len(nodes))
        self.unreadable = {n for n in range(len(self.bytes)) if self.draw.random() < cluster.unreadable}
        self.now = self.held = 0.0
        self.running = self.records = 0
        self.commits: dict[int, float] = {}
        self.attempted: set[int] = set()
        self.workers: list[Worker] = []
        self.looks = [(0.0, spare.Snapshot(-math.inf, []))]
        """Snapshots that were left for others, with the time from which they can be read."""
        self.ends, self.vain, self.requests = Counter[str](), Counter[str](), Counter[str]()

    def run(self) -> dict[str, Any]:
        """Submit what is missing until nothing is; returns the figures."""
        submissions = 0
        while missing := sorted(set(range(len(self.bytes))) - set(self.commits)):
            made = submission.draft(missing, "slurm", self.tasks, 1, "")
            self.slots = [made.slot(slot) for slot in range(made.slots)]
            self.left = [dict.fromkeys(own) for own in self.slots]
            self.owner = {number: slot for slot, own in enumerate(self.slots) for number in own}
            self._play([self._element(slot) for slot in range(made.slots)])
            self.unreadable.clear()
            self.now += self.cluster.operator
            submissions += 1
        total, times = sum(self.bytes), sorted(self.commits.values())
        ideal = total / (NODE * sum(self.rates))
        return {
            "partitions": len(self.bytes),
            "of_a_workers_time": round(len(self.rates) * NODE / len(self.bytes), 4),
            "ideal_hours": round(ideal / HOUR, 3),
            "over_ideal": round(times[-1] / ideal, 3),
            "99_percent_over_ideal": round(times[len(times) * 99 // 100] / ideal, 3),
            "held_over_ideal": round(self.held / ideal / NODE / len(self.rates), 3),
            "in_vain": {cause: round(lost / total, 5) for cause, lost in sorted(self.vain.items())},
            "submissions": submissions,
            "ends": dict(sorted(self.ends.items())),
            "requests": dict(sorted(self.requests.items())),
            "dollars": round(sum(PRICES[verb] * count for verb, count in self.requests.items()), 2),
        }

    def _play(self, processes: list[Process]) -> None:
        """Run processes until all have ended; each yields the seconds until it continues."""
        order = itertools.count()
        self.events = [(self.now, next(order), process) for process in processes]
        while self.events:
            self.now, _, process = heapq.heappop(self.events)
            pause = next(process, None)
            if pause is not None:
                heapq.heappush(self.events, (self.now + pause, next(order), process))

    def _element(self, slot: int) -> Process:
        """An element of the job array: its tasks, one after another, until SLURM does not requeue it."""
        again = True
        while again:
            while self.running == self.slurm.concurrency or (gpu := self._gpu()) is None:
                yield SCHEDULER
            self.running += 1
            began = self.now
            cause = yield from self._task(slot, gpu)
            self.held += self.now - began
            self.running -= 1
            self.ends[cause] += 1
            self.requests["PUT"] += int((self.now - began) / BEAT)
            if cause == "preempted":
                heapq.heappush(self.events, (self.now + self.cluster.taken, -gpu - 1, self._returned(gpu)))
            else:
                self.free.append(gpu)
            again = cause in ("preempted", "time limit", "node died")
            if again:
                yield self.cluster.unseen if cause == "node died" else self.cluster.requeue

    def _gpu(self) -> int | None:
        """A free GPU whose node is alive."""
        assert max(self.deaths) > self.now, "every node is dead"
        while self.free:
            gpu = self.free.pop(self.draw.randrange(len(self.free)))
            if self.deaths[gpu // NODE] > self.now:
                return gpu
        return None

    def _returned(self, gpu: int) -> Process:
        self.free.append(gpu)
        yield from ()

    def _task(self, slot: int, gpu: int) -> Generator[float, None, str]:
        """One run of a worker on a GPU; returns how it ended."""
        self.requests.update({"GET": 5, "LIST": self._pages()})  # plan, submission; commits
        todo = [self.partitions[number] for number in self.slots[slot] if number not in self.commits]
        if not todo:
            return "done"
        draw, one = self.draw.expovariate, self.cluster
        trouble = {
            "time limit": self.now + 60 * self.slurm.time - self.slurm.grace,
            "preempted": self.now + draw(1 / one.preempted),
            "killed": self.now + draw(1 / one.worker_life),
            "node died": self.deaths[gpu // NODE],
        }
        cause, end = min(trouble.items(), key=lambda item: item[1])
        yield min(one.start, end - self.now)
        worker = Worker(slot)
        self.workers.append(worker)
        self.records += 1
        if (yield from self._work(worker, todo, self.rates[gpu // NODE], end, cause)):
            cause = "done"
        worker.known = self.now + (SILENT if cause in ("killed", "node died") else 0)
        return cause

    def _work(
        self, worker: Worker, todo: list[Partition], rate: float, end: float, cause: str
    ) -> Generator[float, None, bool]:
        """What `embed` does with its own partitions, then with others'; returns whether it was done before its end."""
        tried = {partition.id for partition in todo}
        own = frozenset(tried)
        order = PartitionQueue(todo, lambda: self._spare(worker, tried))
        ahead, asked = iter(order), 0
        for place, partition in enumerate(order):
            number = partition.id
            while asked <= place + self.ahead and next(ahead, None):
                asked += 1
            if number in self.commits:
                worker.claims.pop(number, None)
                order.jump()
                continue
            worker.claims.setdefault(number, self.now + self.draw.uniform(0, BEAT))
            began = self.now
            done = began + self.bytes[number] / rate + (0 if number in own else worker.looking)
            yield max(0.0, min(done, end) - began)
            if done > end:
                self.vain[cause] += int((self.now - began) * rate)
                return False
            self._finish(number, order)
            worker.claims.pop(number)
        return True

    def _finish(self, number: int, order: PartitionQueue) -> None:
        for verb, count in A_PARTITION.items():
            self.requests[verb] += count
        for verb, count in A_TAR.items():
            self.requests[verb] += count * len(self.partitions[number].slices)
        if number in self.unreadable:
            self.attempted.add(number)
            self.vain["unreadable"] += self.bytes[number]
        elif number in self.commits:
            self.vain["done twice"] += self.bytes[number]
            order.jump()
        else:
            self.commits[number] = self.now
            del self.left[self.owner[number]][number]

    def _spare(self, worker: Worker, tried: set[int]) -> Partition | None:
        """Does what `spare.spare` does: choose by the snapshot that was left, or by one of its own."""
        if not self.share:
            return None
        look = self._left()
        worker.looking = GET_SECONDS
        self.requests["GET"] += 1
        if (age := self.now - look.seen) >= BEAT:
            if age < SILENT:
                self._leave(look._replace(seen=self.now), 0.0)
            look = self._look()
            worker.looking = self._look_seconds()
            self.requests.update({"LIST": self._pages() + 2, "GET": self.records + 1})
        number = spare.choose(look.left, tried)
        self._leave(look.less(number), worker.looking)
        if number is None:
            return None
        tried.add(number)
        worker.claims[number] = self.now + worker.looking
        return self.partitions[number]

    def _left(self) -> spare.Snapshot:
        """The last snapshot that was left."""
        times = [since for since, _ in self.looks if since <= self.now]
        del self.looks[: len(times) - 1]
        return self.looks[0][1]

    def _leave(self, look: spare.Snapshot, after: float) -> None:
        self.requests["PUT"] += 1
        self.looks.append((self.now + after, look))
        self.looks.sort(key=lambda one: one[0])

    def _look(self) -> spare.Snapshot:
        """Take a snapshot of the records as they can be read now; `left` already knows what is committed."""
        self.workers = [one for one in self.workers if one.known > self.now]
        taken = set(self.attempted)
        taken.update(number for one in self.workers for number, since in one.claims.items() if since <= self.now)
        left = ([number for number in self.left[one.slot] if number not in taken] for one in self.workers)
        return spare.Snapshot(self.now, list(left))

    def _pages(self) -> int:
        """The number of requests that a listing of the commits takes."""
        return 1 + len(self.commits) // PAGE

    def _look_seconds(self) -> float:
        return self._pages() * LIST_SECONDS + self.records * GET_SECONDS / 32


def _bytes(partition: Partition) -> int:
    return sum(piece.shard.size or 0 for piece in partition.slices)


def make(tars: int, partition_bytes: str, folder: str) -> Plan:
    """Make the real plan of this number of tars."""
    fsspec.register_implementation("laion", Tars, clobber=True)
    config = PlanConfig(input=["laion://tars"], model="fake:768", partition_bytes=partition_bytes)
    return make_plan(config.input, folder, config, storage=StorageConfig({"tars": tars}))


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--tars", type=int, default=585_000)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=312, help="samples a second of a GPU")
    parser.add_argument("--partition-bytes", nargs="+", default=["1GB", "2GB", "4GB", "8GB"])
    parser.add_argument("--time", type=int, default=240, help="minutes of a task")
    parser.add_argument("--tasks", type=int, default=0, help="of a submission; 0: one a partition, 1,000 at the most")
    parser.add_argument("--concurrency", type=int, default=1000)
    parser.add_argument("--calm", action="store_true", help="no trouble: GPUs of one speed that live for ever")
    options = parser.parse_args()
    cluster = Cluster(options.gpus, options.rate)
    if options.calm:
        cluster = replace(cluster, **CALM)
    slurm = SlurmConfig(time=options.time, concurrency=options.concurrency)
    runs = []
    for size in options.partition_bytes:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            plan = make(options.tars, size, folder)
            facts = {"partition_bytes": size, "plan_seconds": round(time.perf_counter() - began, 1)}
            facts["plan_parquet"] = os.path.getsize(f"{folder}/_clip_batch/plan.parquet")
        for share in (True, False):
            runs.append({**facts, "share": share, **Simulation(plan, cluster, slurm, share, options.tasks).run()})
            print(json.dumps(runs[-1]), file=sys.stderr)
    rows = []
    for helping, alone in zip(runs[::2], runs[1::2], strict=True):
        last = helping["over_ideal"], alone["over_ideal"]
        size = f"partitions of {helping['partition_bytes']}"
        what = f"{options.tars:,} tars simulated, {options.gpus:,} GPUs, {size}: last commit over the ideal time"
        ratio = round(last[1] / last[0], 2)
        rows.append(result.Row(helping["partition_bytes"], what, "times", *last, "`--no-share`", ratio))
    result.report("laion", "launch", options, rows, {"cluster": asdict(cluster), "runs": runs})


if __name__ == "__main__":
    main()
