"""Sweep: index keys tried on a sample of the user's own embeddings, before a merge.

Each key is trained and filled with the sample, then searched with held-out queries by one thread, at more and more
effort until the recall is reached. A key's inverted lists are meant for all rows; the sample gets as many fewer as it
has fewer rows, so that a list is as long as it will be. What differs at full size: more lists must be told apart
(somewhat more effort for the same recall; merge measures it), and a kind that scans all rows takes longer in
proportion, which the milliseconds here include.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from clip_batch.config import MergeConfig, StorageConfig, SweepConfig, parse_bytes
from clip_batch.embeddings import reader
from clip_batch.embeddings.outputs import Outputs
from clip_batch.errors import ConfigError
from clip_batch.index.ann import faiss_index, faiss_search, footprint, index_keys, recall
from clip_batch.index.ann.libfaiss import Index
from clip_batch.index.ann.rerank import candidates, rerank, score
from clip_batch.index.merge.queries import draw_queries, filled_rows, held_out_rows
from clip_batch.index.merge.trial import try_efforts
from clip_batch.plan.plan import load_plan
from clip_batch.storage import npy
from clip_batch.storage.store import Store
from clip_batch.types import counted

FACTORS = (0, 10, 30)
"""Re-ranking factors that are tried with a key whose codes are less exact than the vectors."""

BATCH = 32
"""Queries of one search."""

ROUNDS = 2
"""How often each batch is timed; the fastest counts."""

TRAINING_ROWS = 39
"""Rows for each entry of a codebook below which faiss warns that it is badly trained, for every round of training."""

FEW_TRAINING_ROWS = 10_000
"""Up to so many rows one thread trains a key: the pieces of work are so small that several only wait for each other."""

LEAST_GAIN = 0.001
"""Recall that doubling the effort twice must gain; otherwise it is not doubled again."""

Say = Callable[[str], None]
Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EffortResult:
    """One effort (None: nothing to tune): recall@10, the least over the kinds of queries; milliseconds a query."""

    effort: int | None
    recall: float
    ms: float


@dataclass(frozen=True)
class Candidate:
    """An index key, for all rows, with a re-ranking factor (0: none), and its results on the sample.

    `memory` is what the index of all rows takes when served, `disk` what re-ranking keeps beside it, both in bytes.
    Seconds are the sample's. `best` is the least effort that reaches the recall.
    """

    key: str
    rerank: int
    bytes_per_vector: int
    memory: int
    disk: int
    fits: bool
    train_seconds: float
    build_seconds: float
    tries: tuple[EffortResult, ...]
    best: EffortResult | None


@dataclass(frozen=True)
class Sweep:
    """The candidates, the recall and memory asked of them, and the recommended one (None: none will do)."""

    modality: str
    rows: int
    dim: int
    sample: int
    recall: float
    memory: int
    candidates: tuple[Candidate, ...]
    recommended: Candidate | None


@dataclass(frozen=True)
class SweepSample:
    """The rows that keys are tried on, in `half` float16 and `exact` float32, both (n, d).

    `queries` (q, d) by kind are held out; `truth` has the scores and rows (q, 10) of their exact search.
    """

    half: npy.Half
    exact: Vectors
    queries: dict[str, Vectors]
    truth: dict[str, tuple[Vectors, Ids]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.half)


def sweep(
    output: str,
    config: MergeConfig,
    storage: StorageConfig = StorageConfig(),
    options: SweepConfig = SweepConfig(),
    progress: Say = lambda line: None,
) -> Sweep:
    """Try index keys on a sample of OUT, for `config.recall_target` within `config.index_memory`.

    The first of `config.modalities` is indexed; captions are queries too where there are any. Unless they are
    `options.keys_to_try`, keys are skipped whose codebooks the sample is too small to train. Memory: about `10 d` bytes
    for each row of the sample, and one index of it. ConfigError: faiss refuses a key of `options.keys_to_try`. Other
    errors: see `merge`.
    """
    out, modality = Store(output, storage.storage_options), config.modalities[0]
    source = Outputs((reader.open_embeddings(out, load_plan(out), config.allow_partial),))
    sample, rows = draw(source, modality, config, options.sample)
    memory = parse_bytes(config.index_memory) // sum(kind in sample.queries for kind in config.modalities)
    keys = options.keys_to_try or index_keys.default_keys(rows, source.dim, memory)
    tried: list[Candidate] = []
    distinct = list(dict.fromkeys(key.replace("{}", str(index_keys.list_count(rows))) for key in keys))
    progress(f"{sample.rows:,} of {counted(rows, 'row')} are drawn; {counted(len(distinct), 'index key')} to try")
    for number, index_key in enumerate(distinct, 1):
        if sample.rows < (least := codebook_rows(index_key)) and not options.keys_to_try:
            progress(
                f"skipped: index key {index_key!r} trains on {least:,} rows or more, the sample has {sample.rows:,}"
            )
            continue
        after = f"; then {distinct[number]}" if distinct[number:] else "; then which one to take"
        progress(f"key {number} of {len(distinct)}: {index_key} is trained, built and searched{after}")
        try:
            results = _try_key(index_key, sample, rows, memory, config)
        except ConfigError as error:
            if options.keys_to_try:
                raise
            progress(f"skipped: {error}")
            continue
        tried += results
        for candidate in results:
            progress(describe_candidate(candidate))
    recommended = recommend(tried)
    return Sweep(modality, rows, source.dim, sample.rows, config.recall_target, memory, tuple(tried), recommended)


def codebook_rows(index_key: str) -> int:
    """The rows that training the codebooks of a product quantizer needs; 0 for a key without one.

    >>> codebook_rows("IVF128,PQ24x8"), codebook_rows("PQ48x4fs"), codebook_rows("IVF128,SQ8")
    (9984, 624, 0)
    """
    return TRAINING_ROWS * index_keys.codewords(index_key)


def draw(source: Outputs, modality: str, config: MergeConfig, count: int) -> tuple[SweepSample, int]:
    """A sample of `count` rows without the held-out queries, and the number of all rows.

    ConfigError: there are no vectors of the modality, or too few.
    """
    filled = filled_rows(source, source.check_files())
    if modality not in filled:
        raise ConfigError(f"{source.urls} has no {modality} vectors to index: see --modalities")
    queries = draw_queries(source, filled, config)
    _, half = source.draw(modality, filled[modality], count, config.seed, held_out_rows(queries))
    if len(half) < 2:
        raise ConfigError(f"{source.urls} has too few {modality} vectors to try keys on: merge with Flat")
    half = half[np.random.default_rng(config.seed).permutation(len(half))]
    exact, vectors = npy.unit(half), {kind: npy.unit(drawn) for kind, (_, drawn) in queries.items()}
    truth = {kind: faiss_search.nearest(vectors[kind], exact, 10) for kind in vectors}
    return SweepSample(half, exact, vectors, truth), sum(filled[modality])


def _try_key(index_key: str, sample: SweepSample, rows: int, memory: int, config: MergeConfig) -> list[Candidate]:
    """The candidates of a key, one for each re-ranking factor; `memory` is in bytes, for the index of all `rows`."""
    dim, sample_key = sample.exact.shape[1], index_keys.scaled(index_key, sample.rows / rows)
    started = time.monotonic()
    rows_to_train_on = sample.exact[: config.train_rows or max(10_000, 64 * index_keys.lists(sample_key))]
    if len(rows_to_train_on) <= FEW_TRAINING_ROWS:
        with _one_thread() as thread:
            index = thread.submit(faiss_index.train, sample_key, rows_to_train_on, config.seed).result()
    else:
        index = faiss_index.train(sample_key, rows_to_train_on, config.seed)
    trained = time.monotonic()
    faiss_index.add(index, sample.exact, np.arange(sample.rows))
    built = time.monotonic()
    size = footprint.code_bytes(index_key, dim)
    whole = rows * size + footprint.template_bytes(index_key, dim)
    results = []
    for factor in FACTORS if index_keys.is_lossy(index_key) else FACTORS[:1]:
        tries = _try_efforts(index, sample, factor, config.recall_target, rows)
        best = next((result for result in tries if result.recall >= config.recall_target), None)
        disk = 2 * dim * rows if factor else 0
        seconds = trained - started, built - trained
        results.append(Candidate(index_key, factor, size, whole, disk, whole <= memory, *seconds, tuple(tries), best))
    return results


def _try_efforts(index: Index, sample: SweepSample, factor: int, target: float, rows: int) -> list[EffortResult]:
    """The results of more and more effort, until the recall reaches the target or hardly grows."""
    efforts = faiss_index.efforts(index)
    growth = 1.0 if efforts else max(1.0, rows / sample.rows)  # without an effort to tune every row is scored

    def hardly_grows(results: Sequence[EffortResult]) -> bool:
        return len(results) > 2 and results[-1].recall - results[-3].recall < LEAST_GAIN

    with _one_thread() as thread:

        def search(effort: int | None) -> EffortResult:
            reached, ms = thread.submit(_search, index, sample, factor, effort).result()
            return EffortResult(effort, reached, ms * growth)

        def enough(result: EffortResult) -> bool:
            return result.recall >= target

        return list(try_efforts(efforts or [None], 0, search, lambda _: True, enough, hardly_grows).values())


def _one_thread() -> ThreadPoolExecutor:
    """A thread in which faiss uses no other."""
    return ThreadPoolExecutor(1, initializer=faiss_index.use_threads, initargs=(1,))


def _search(index: Index, sample: SweepSample, factor: int, effort: int | None) -> tuple[float, float]:
    """(recall@10, the least over the kinds of queries; milliseconds a query)."""
    seconds, count, recalls = 0.0, 0, []
    for kind, queries in sample.queries.items():
        hits = []
        for low in range(0, len(queries), BATCH):
            batch, times = queries[low : low + BATCH], []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                if factor:
                    depth = min(candidates(10, factor), sample.rows)
                    _, ids = faiss_search.search(index, batch, depth, effort)
                    scores, ids = rerank(batch, ids, sample.half, 10)
                else:
                    scores, ids = faiss_search.search(index, batch, 10, effort)
                times.append(time.perf_counter() - start)
            seconds, count = seconds + min(times), count + len(batch)
            hits.append((scores, ids, score(batch, ids, sample.half)))
        own = np.full(len(queries), -1)  # no query is in the sample
        scores, ids, true = (np.concatenate(arrays) for arrays in zip(*hits, strict=True))
        trial = recall.measure(own, sample.truth[kind], {0: (scores, ids, true)})
        recalls.append(recall.recall(trial, 0, 10) or 0.0)
    return min(recalls), 1000 * seconds / count


def recommend(tried: list[Candidate]) -> Candidate | None:
    """The fastest candidate that reaches the recall and fits in memory; of equally fast ones the smallest.

    None if there is none.
    """
    good = [(each.best.ms, each.memory, place) for place, each in enumerate(tried) if each.best and each.fits]
    return tried[min(good)[2]] if good else None


def describe_candidate(candidate: Candidate) -> str:
    """A line for people: the key, its sizes, and its recall and milliseconds at its best effort, or its last."""
    result = candidate.best or max(candidate.tries, key=lambda each: each.recall)
    effort = "" if result.effort is None else f"{result.effort}"
    size = f"{candidate.memory / 1e9:.2f}"
    return (
        f"{candidate.key:44s} {candidate.rerank or '':>6} {candidate.bytes_per_vector:>7} {size:>8} "
        f"{result.recall:>9.3f} {effort:>6} {result.ms:>8.3f} "
        f"{candidate.train_seconds:>8.1f} {candidate.build_seconds:>8.1f}  "
        f"{'' if candidate.best else 'recall too low '}{'' if candidate.fits else 'too large'}"
    ).rstrip()


def describe(sweep: Sweep) -> str:
    """The table for people, and the recommendation with the options of merge for it."""
    lines = [
        f"{sweep.sample:,} of {sweep.rows:,} {sweep.modality} rows; wanted: recall@10 of {sweep.recall} "
        f"within {sweep.memory / 1e9:g} GB; ms of one thread",
        f"{'key':44s} rerank B/vector       GB recall@10 effort ms/query  train s  build s",
        *map(describe_candidate, sweep.candidates),
    ]
    if (best := sweep.recommended) is None:
        lines.append("none reaches the recall within the memory: raise --index-memory or lower --recall-target")
    else:
        rerank = f" --rerank {best.rerank}" if best.rerank else ""
        disk = f" ({best.disk / 1e9:.2f} GB of vectors on disk)" if best.disk else ""
        lines.append(f"take: clip-batch merge --index-key {best.key}{rerank}{disk}")
    return "\n".join(lines)
