"""Sweep: index keys tried on a sample of the user's own embeddings, before a merge.

Each key is trained and filled with the sample, then asked with held-out queries, one thread, at more
and more effort until the recall is reached. A key's inverted lists are meant for all rows; the sample
gets as many fewer as it has fewer rows, so that a list is as long as it will be. What differs at full
size: more lists must be told apart (somewhat more effort for the same recall; merge measures it), and
a kind that scans all rows takes longer in proportion, which the milliseconds here include.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from clip_batch.config import MergeConfig, StorageConfig, SweepConfig, parse_bytes
from clip_batch.embeddings import reader
from clip_batch.errors import ConfigError
from clip_batch.index.ann import faiss_index, recall
from clip_batch.index.ann.rerank import candidates as depth
from clip_batch.index.ann.rerank import rerank, score
from clip_batch.plan import paths
from clip_batch.plan.plan import load_plan
from clip_batch.storage import npy
from clip_batch.storage.store import Store

FACTORS = (0, 10, 30)
"""Re-ranking that is tried with codes that lose something."""

BATCH = 32
"""Queries that are asked at once."""

ROUNDS = 2
"""How often each batch is timed; the fastest counts."""

LEAST_GAIN = 0.001
"""Of recall: where an effort doubled twice gains less than this, it is not doubled again."""

FEWEST_LISTS = 4

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
    """A key, for all rows, with a re-ranking factor (0: none), and what it did on the sample.

    `memory` is what the index of all rows takes when served (bytes), `disk` what re-ranking keeps
    beside it. Seconds are the sample's. `best` is the least effort that reaches the recall.
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
    """The candidates, what was wanted of them, and the one to take (None: none will do)."""

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
    """What keys are tried on: `half` float16 and `exact` float32 (n, d); queries (q, d) and their true rows by kind."""

    half: npy.Half
    exact: Vectors
    queries: dict[str, Vectors]
    truth: dict[str, tuple[Vectors, Ids]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.half)


def sweep(
    output: str,
    config: MergeConfig,
    storage: StorageConfig = StorageConfig(),
    options: SweepConfig = SweepConfig(),
    progress: Say = lambda line: None,
) -> Sweep:
    """Try keys on a sample of OUT, for `config.recall_target` within `config.index_memory`.

    The first of `config.modalities` is indexed; captions ask too where there are any. Memory: some
    `10 d` bytes a row of the sample, and one index of it. ConfigError: faiss refuses a key that was
    given. Other errors: see `merge`.
    """
    out, modality = Store(output, storage.storage_options), config.modalities[0]
    source = reader.open_embeddings(out, load_plan(out), config.allow_partial)
    sample, rows = draw(source, modality, config, options.sample)
    memory = parse_bytes(config.index_memory) // len(config.modalities)
    keys = options.keys_to_try or default_keys(rows, source.dim, memory)
    found: list[Candidate] = []
    for key in dict.fromkeys(key.replace("{}", str(list_count(rows))) for key in keys):
        try:
            tried = _try_key(key, sample, rows, memory, config)
        except ConfigError as error:
            if options.keys_to_try:
                raise
            progress(f"left out: {error}")
            continue
        found += tried
        for one in tried:
            progress(describe_candidate(one))
    chosen = recommend(found)
    return Sweep(modality, rows, source.dim, sample.rows, config.recall_target, memory, tuple(found), chosen)


def draw(source: reader.Embeddings, modality: str, config: MergeConfig, wanted: int) -> tuple[SweepSample, int]:
    """The sample, without the held-out queries, and how many rows the whole has. ConfigError: no such vectors."""
    kinds = [kind for kind, folder in paths.VECTORS.items() if all(part.file(folder) for part in source.commits)]
    captioned = source.check_files(tuple(kinds))
    filled: Mapping[str, list[int]] = {"image": [part.rows for part in source.commits], "text": captioned}
    kinds = [kind for kind in kinds if sum(filled[kind])]
    if modality not in kinds:
        raise ConfigError(f"{source.store.url} has no {modality} vectors to index: see --modalities")
    queries, held_out = {}, [np.empty(0, dtype=np.int64)]
    for kind in kinds:
        count = min(config.queries, max(1, sum(filled[kind]) // 10))
        places, drawn = source.draw(kind, filled[kind], count, config.seed)
        queries[kind] = npy.unit(drawn)
        held_out.append(places)
    without = np.unique(np.concatenate(held_out))
    _, half = source.draw(modality, filled[modality], wanted, config.seed, without)
    if len(half) < 2:
        raise ConfigError(f"{source.store.url} has too few {modality} vectors to try keys on: merge with Flat")
    half = half[np.random.default_rng(config.seed).permutation(len(half))]
    made = SweepSample(half, npy.unit(half), queries)
    for kind, asked in queries.items():
        made.truth[kind] = faiss_index.nearest(asked, made.exact, 10)
    return made, sum(filled[modality])


def list_count(rows: int) -> int:
    """Inverted lists for rows: the power of two nearest to 4 sqrt(rows), the low end of faiss's own advice."""
    return int(2 ** round(math.log2(max(FEWEST_LISTS, 4 * math.sqrt(rows)))))


def default_keys(rows: int, dim: int, memory: int) -> list[str]:
    """One key of each kind that may fit; {} stands for the number of lists."""
    ivf = "IVF{}_HNSW32"
    keys = ["Flat", f"{ivf},Flat", f"{ivf},SQ8"]
    if dim % 8 == 0:
        keys += [f"OPQ{dim // 8}_{dim},{ivf},PQ{dim // 8}x8", f"{ivf},PQ{dim // 4}x4fs"]
    keys += [f"RR{dim},{ivf},RaBitQfs", f"RR{dim},{ivf},RaBitQfs4", "HNSW32"]
    try:
        return [faiss_index.choose_key(rows, dim, memory, 0), *keys]
    except ConfigError:  # autofaiss knows none that fits, or is not there
        return keys


def scaled(key: str, share: float) -> str:
    """The key for a share of the rows: as many lists fewer."""
    lists = max(FEWEST_LISTS, round(faiss_index.lists(key) * min(share, 1)))
    return re.sub(r"IVF\d+[kM]?", f"IVF{min(lists, faiss_index.lists(key))}", key)


def _try_key(key: str, sample: SweepSample, rows: int, memory: int, config: MergeConfig) -> list[Candidate]:
    dim, here = sample.exact.shape[1], scaled(key, sample.rows / rows)
    started = time.monotonic()
    training = config.train_rows or max(10_000, 64 * faiss_index.lists(here))
    made = faiss_index.train(here, sample.exact[:training], config.seed)
    trained = time.monotonic()
    faiss_index.add(made, sample.exact, np.arange(sample.rows))
    built = time.monotonic()
    size = faiss_index.code_bytes(key, dim)
    whole = rows * size + faiss_index.template_bytes(key, dim)
    found = []
    for factor in FACTORS if _loses(key) else FACTORS[:1]:
        tries = _try_efforts(made, sample, factor, config.recall_target, rows)
        best = next((one for one in tries if one.recall >= config.recall_target), None)
        disk = 2 * dim * rows if factor else 0
        seconds = trained - started, built - trained
        found.append(Candidate(key, factor, size, whole, disk, whole <= memory, *seconds, tuple(tries), best))
    return found


def _loses(key: str) -> bool:
    """Whether a key's codes are less than the vectors."""
    return not re.search(r"(Flat|HNSW\d+)$", key)


def _try_efforts(
    made: faiss_index.Index, sample: SweepSample, factor: int, target: float, rows: int
) -> list[EffortResult]:
    efforts: list[int | None] = [*faiss_index.efforts(made)]
    growth = 1.0 if efforts else max(1.0, rows / sample.rows)  # nothing to tune: every row is looked at
    tries: list[EffortResult] = []
    with ThreadPoolExecutor(1, initializer=faiss_index.use_threads, initargs=(1,)) as alone:
        for effort in efforts or [None]:
            reached, ms = alone.submit(_ask, made, sample, factor, effort).result()
            tries.append(EffortResult(effort, reached, ms * growth))
            stands = len(tries) > 2 and reached - tries[-3].recall < LEAST_GAIN
            if reached >= target or stands:
                break
    return tries


def _ask(made: faiss_index.Index, sample: SweepSample, factor: int, effort: int | None) -> tuple[float, float]:
    """(recall@10, the least over the kinds of queries; milliseconds a query)."""
    seconds, asked, shares = 0.0, 0, []
    for kind, queries in sample.queries.items():
        found = []
        for low in range(0, len(queries), BATCH):
            batch, times = queries[low : low + BATCH], []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                if factor:
                    _, ids = faiss_index.search(made, batch, min(depth(10, factor), sample.rows), effort)
                    scores, ids = rerank(batch, ids, sample.half, 10)
                else:
                    scores, ids = faiss_index.search(made, batch, 10, effort)
                times.append(time.perf_counter() - start)
            seconds, asked = seconds + min(times), asked + len(batch)
            found.append((scores, ids, score(batch, ids, sample.half)))
        scores, ids, true = (np.concatenate(parts) for parts in zip(*found, strict=True))
        own = np.full(len(queries), -1)  # held out: no query is in the sample
        trial = recall.measure(own, sample.truth[kind], [(scores, ids, true)])
        shares.append(recall.recall(trial, 0, 10) or 0.0)
    return min(shares), 1000 * seconds / asked


def recommend(found: list[Candidate]) -> Candidate | None:
    """The fastest that reaches the recall and fits in memory; of equals the smallest. None: none does."""
    good = [(one.best.ms, one.memory, at) for at, one in enumerate(found) if one.best and one.fits]
    return found[min(good)[2]] if good else None


def describe_candidate(one: Candidate) -> str:
    """A candidate as a line: what it is, and recall and milliseconds at its best effort, or at its last."""
    last = one.best or max(one.tries, key=lambda tried: tried.recall)
    effort = "" if last.effort is None else f"{last.effort}"
    size = f"{one.memory / 1e9:.2f}"
    return (
        f"{one.key:44s} {one.rerank or '':>6} {one.bytes_per_vector:>7} {size:>8} {last.recall:>9.3f} {effort:>6} "
        f"{last.ms:>8.3f} {one.train_seconds:>8.1f} {one.build_seconds:>8.1f}  "
        f"{'' if one.best else 'recall too low '}{'' if one.fits else 'too large'}"
    ).rstrip()


def describe(found: Sweep) -> str:
    """The table for people, and the recommendation with the options that merge wants for it."""
    head = f"{'key':44s} rerank B/vector       GB recall@10 effort ms/query  train s  build s"
    lines = [
        f"{found.sample:,} of {found.rows:,} {found.modality} rows; wanted: recall@10 of {found.recall} "
        f"within {found.memory / 1e9:g} GB; ms of one thread",
        head,
        *map(describe_candidate, found.candidates),
    ]
    if (one := found.recommended) is None:
        lines.append("none reaches the recall within the memory: give it more memory, or ask for less recall")
    else:
        rerank = f" --rerank {one.rerank}" if one.rerank else ""
        disk = f" ({one.disk / 1e9:.2f} GB of vectors on disk)" if one.disk else ""
        lines.append(f"take: clip-batch merge --index-key {one.key}{rerank}{disk}")
    return "\n".join(lines)
