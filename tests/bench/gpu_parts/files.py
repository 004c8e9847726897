"""From tars to commits, with captions: in one process, and by several workers that share the GPU.

A model is loaded once for the runs of one process: alone, then with as many decoding threads as feed it, then with at
most 4. The tars are links to one, so that they are written fast. The rate of one process is that between its
first batch and its last; planning, loading and compiling come before. The rate of several workers is that of the time
in which all of them were at work, by the times in their commits.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import sys
import threading
import time
from collections import Counter
from itertools import takewhile
from typing import Any, NamedTuple

from clip_batch.config import EmbedConfig, PlanConfig, StorageConfig
from clip_batch.embeddings.commits import read_commits
from clip_batch.embeddings.embed import embed
from clip_batch.embeddings.slots import Slot, partitions
from clip_batch.embeddings.workers import WorkerRun
from clip_batch.encoders.torch_encoder import LANES
from clip_batch.errors import EncoderError
from clip_batch.launch.local import run_workers
from clip_batch.plan.plan import make_plan
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec
from tests.bench.data_path import write_tars
from tests.bench.gpu_parts import Options, Part, Skipped
from tests.bench.gpu_parts.encoder import loaded, resolved
from tests.bench.gpu_parts.model import alone
from tests.bench.gpu_parts.timing import watched

SAMPLES = 4000
"""Samples of a tar."""

MOST = 4000
"""Pairs a second that one process is thought to get through at most: what is planned is to last as long as asked."""


class Alone(NamedTuple):
    """Pairs a second of a model alone, and whether it could be compiled."""

    rate: float
    compiled: bool


def run(part: Part) -> None:
    quick = part.options.quick
    first, *others = part.options.model
    small = others[-1] if others else first
    steady = 1.0 if quick else 6.0
    rates: dict[str, Alone] = {}
    part.attempt(f"{first}, one process", 30, one_process, part, first, steady, rates)
    for model, workers in [(small, 1), (small, 2 if quick else 8), (small, 4), (first, 2)][: 2 if quick else None]:
        if workers > 1:
            part.attempt(
                f"{model}, {workers} workers", 24, several, part, model, workers, 8.0 if steady > 1 else steady, rates
            )
        elif model != first:
            part.attempt(f"{model}, one process", 24, one_process, part, model, steady, rates)


def tars(options: Options, samples: int) -> list[str]:
    """Tars of 256-pixel JPEGs with captions that have at least so many samples together."""
    folder, each = f"{options.home}/tars", 64 if options.quick else SAMPLES
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(f"{folder}/00000.tar"):
        write_tars(folder, 1, each)
    paths = [f"{folder}/{number:05d}.tar" for number in range(math.ceil(samples / each))]
    for path in paths[1:]:
        if not os.path.exists(path):
            os.link(paths[0], path)
    return paths


def batch_size(model: str, options: Options) -> int:
    """The size of batches, for which the model is compiled."""
    return (512 if model == options.model[0] else 1024) if options.cuda else 8


def planned(spec: EncoderSpec, options: Options, out: str, samples: int, count: int) -> None:
    """Plan so many samples in `count` partitions."""
    config = PlanConfig(
        input=tars(options, samples),
        model=spec.model,
        pretrained=spec.pretrained,
        preprocess="fast",
        precision=options.precision,  # type: ignore[arg-type]
        partition_count=count,
        try_model=False,
    )
    make_plan(config.input, out, config)


def one_process(part: Part, model: str, steady: float, rates: dict[str, Alone]) -> None:
    """`embed` in this process, with its encoder loaded before."""
    options = part.options
    size = batch_size(model, options)
    spec = resolved(model, options)
    compiled = True
    try:
        encoder, load = loaded(spec, options, size)
    except EncoderError as error:
        part.note(f"{model} is not compiled: {error}")
        compiled = False
        encoder, load = loaded(spec, options, 0)
    launches = Launches(encoder._launching)
    encoder._launching = launches
    rate = alone(part, model, size, compiled, encoder, load)
    rates[model] = Alone(rate, compiled)
    part.figure(f"{model}_launch_ms_alone", launches.mean_ms())
    out = f"{options.home}/{model}-1"
    planned(spec, options, out, round(min(rate, MOST) * steady), 4)
    for threads in (4, 0):
        shutil.copytree(out, f"{out}-{threads}")
        config = EmbedConfig(batch_size=size, device=options.device, progress=False, threads=threads)
        part.attempt(
            f"{model}, threads: {threads}", steady, embedded, part, model, config, f"{out}-{threads}", encoder, rate
        )


def embedded(part: Part, model: str, config: EmbedConfig, out: str, encoder: Any, alone: float) -> None:
    """`embed` of a plan in this process, with an encoder that does `alone` pairs a second."""
    counters, launches = WorkerRun(), encoder._launching
    launches.clear()
    with watched(part.options.cuda) as gpu, Watch(counters, launches) as watch:
        outcomes = embed(out, config, run=counters, encoder=encoder)
        state = gpu(watch.first)
    assert all(outcome.state == "committed" and not outcome.failed for outcome in outcomes), outcomes
    key, what = f"{model}_1", f"{model}, {'up to ' if config.threads else 'enough'}{config.threads or ''} threads"
    if config.threads:
        key += f"_{config.threads}"
    part.row(key, f"{what}: tars to commits", "pairs/s", watch.rate, alone, "the model alone")
    if state:
        part.row(f"{key}_busy", f"{what}: the GPU is busy", "%", state["busy"])
    part.row(f"{key}_cpu", f"{what}: time of the cores for a pair", "ms", 1000 * watch.cpu)
    part.row(f"{key}_launch", f"{what}: launching, of a batch", "ms", 1000 * watch.launch * config.batch_size)
    places = watch.summary()
    part.row(f"{key}_lock", f"{what}: encoders wait for a launch", "%", 100 * watch.waiting)
    part.row(f"{key}_wait", f"{what}: encoders wait for the GPU", "%", 100 * watch.share("encode", "_on_host"))
    figures: dict[str, Any] = {
        "first_batch_s": watch.first,
        "whole_s": watch.whole,
        "gpu": state,
        "pairs": counters.samples,
    }
    figures["launch_ms"] = launches.mean_ms()
    name = f"{model}_{config.threads}" if config.threads else model
    part.figure(name, {**figures, "batch": config.batch_size, "threads": places})


class Launches:
    """Stands in for the lock within which batches are launched: how long threads waited for it, and held it."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock
        self.clear()

    def clear(self) -> None:
        """Forget what was."""
        self.waited = self.held = self._begun = 0.0
        self.count = 0

    def mean_ms(self) -> float:
        """Milliseconds of one launch, of images or of captions, on average."""
        return 1000 * self.held / max(self.count, 1)

    def __enter__(self) -> None:
        asked = time.perf_counter()
        self.lock.__enter__()
        self._begun = time.perf_counter()
        self.waited += self._begun - asked

    def __exit__(self, *raised: Any) -> None:
        self.held += time.perf_counter() - self._begun
        self.count += 1
        self.lock.__exit__(*raised)


def several(part: Part, model: str, workers: int, steady: float, rates: dict[str, Alone]) -> None:
    """Worker processes on one device, as `embed --workers N` starts them."""
    options = part.options
    if model not in rates:
        raise Skipped("the model alone was not measured")
    spec = resolved(model, options)
    out = f"{options.home}/{model}-{workers}"
    planned(spec, options, out, round(min(rates[model].rate, MOST * workers) * steady), 6 * workers)
    # These few samples would not pay for it, as those of a whole data set do.
    asked: dict[str, Any] = {"compile": True} if options.cuda and rates[model].compiled else {}
    config = EmbedConfig(batch_size=batch_size(model, options), device=options.device, progress=False, **asked)
    used, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    with watched(options.cuda) as gpu:
        code = run_workers(out, workers, config, StorageConfig())
        whole = time.time() - begun
        commits = read_commits(Store(out))
        slots = [partitions(Store(out), Slot(number, workers)) for number in range(workers)]
        start = max(min(commits[number].started for number in slot) for slot in slots)
        end = min(max(commits[number].finished for number in slot) for slot in slots)
        state = gpu(start - begun)
    assert code == 0, f"the workers ended with {code}"
    rows = sum(
        commit.rows
        * max(0, min(end, commit.finished) - max(start, commit.started))
        / (commit.finished - commit.started)
        for commit in commits.values()
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = (after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime) / sum(c.rows for c in commits.values())
    what = f"{model}: tars to commits, {workers} workers"
    part.row(f"{model}_{workers}", what, "pairs/s", rows / (end - start), rates[model].rate, "the model alone")
    if state:
        part.row(f"{model}_{workers}_busy", f"{model}: the GPU is busy, {workers} workers", "%", state["busy"])
    figures = {"together_s": end - start, "first_commit_s": start - begun, "whole_s": whole, "cpu_s_pair": cpu}
    part.figure(f"{model}_{workers}", {**figures, "gpu": state})


class Watch:
    """Looks at a run every tenth of a second: its samples, the time of the cores, and what its threads are doing."""

    def __init__(self, run: WorkerRun, launches: Launches) -> None:
        self.run, self.launches = run, launches
        self.first = self.whole = self.rate = self.cpu = self.launch = self.waiting = 0.0
        self._seen: list[tuple[float, int, float, float, float]] = []
        self._places: dict[str, Counter[str]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watch")

    def __enter__(self) -> Watch:
        self._started = time.perf_counter()
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        idle = len(list(takewhile(lambda seen: not seen[1], self._seen)))
        first, before, cpu, held, waited = self._seen[min(idle, len(self._seen) - 2)]
        last, after, cpu_after, held_after, waited_after = self._seen[-1]
        self.first, self.whole = first, last
        self.rate = (after - before) / (last - first)
        self.cpu = (cpu_after - cpu) / max(after - before, 1)
        self.launch = (held_after - held) / max(after - before, 1)
        self.waiting = (waited_after - waited) / (last - first) / LANES

    def summary(self) -> dict[str, dict[str, float]]:
        """By kind of thread, the share of its looks in each function, the most frequent first."""
        return {
            kind: {place: round(count / places.total(), 3) for place, count in places.most_common(6)}
            for kind, places in self._places.items()
        }

    def share(self, kind: str, function: str) -> float:
        """The share of the looks at a kind of thread in which it was in a function of ours."""
        places = self._places.get(kind, Counter())
        return sum(count for place, count in places.items() if place.startswith(f"{function} ")) / max(
            places.total(), 1
        )

    def _loop(self) -> None:
        while not self._stop.wait(0.1):
            self._look()

    def _look(self) -> None:
        now, launches = time.perf_counter() - self._started, self.launches
        self._seen.append((now, self.run.samples, time.process_time(), launches.held, launches.waited))
        names = {thread.ident: thread.name.partition("_")[0] for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            kind = names.get(ident, "other")
            inner, ours = frame, None
            while frame.f_back and not ours:
                ours = frame.f_code.co_name if "clip_batch" in frame.f_code.co_filename else None
                frame = frame.f_back
            if kind != "watch" and self.run.samples:
                self._places.setdefault(kind, Counter())[f"{ours} > {inner.f_code.co_name}:{inner.f_lineno}"] += 1
