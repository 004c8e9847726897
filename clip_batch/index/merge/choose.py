"""The choice of an index key: what the rule proposes is tried on this data, before anything is built.

Codes are tried apart from probing: every list is visited, so that only what the codes confuse is lost. The sample is
the one that the index is trained on, and the winner's trained index is the template.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clip_batch.index.ann import clusters, faiss_index, faiss_search, footprint, index_keys
from clip_batch.index.ann.index_keys import Choice
from clip_batch.index.ann.libfaiss import Index
from clip_batch.index.ann.recall import DEPTHS, TOP
from clip_batch.index.ann.rerank import candidates

FACTORS = (2, 3, 5, 8, 12, 20, 30)
"""How many times k candidates may be re-ranked: the least that suffices is taken."""

SHARE = 0.4
"""The share of the missing recall, 1 - target, that codes may cost; probing gets the rest."""

SHOWN = str(TOP)
"""The k whose recall decides. For small k a sample shows too few neighbours, and `candidates` has its own least."""

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Say = Callable[[str], None]


@dataclass(frozen=True)
class TriedKey:
    """An index key that was tried with the re-ranking of so many times k candidates.

    `recall[kind]` has the recall at "10" and "100" on the sample with every list visited, `bytes` are those of a vector
    in memory, `verdict` is why the key was taken or not. `seconds` were spent on training and searching it, besides
    the centroids that all keys share.
    """

    key: str
    rerank: int
    bytes: int
    recall: dict[str, dict[str, float]]
    seconds: float
    verdict: str


def choose(
    choices: Sequence[Choice],
    sample: Vectors,
    queries: Mapping[str, Vectors],
    rows: int,
    target: float,
    seed: int,
    progress: Say = lambda line: None,
) -> tuple[Index, Choice, list[TriedKey]]:
    """The trained empty index of the first choice whose codes suffice, that choice, and what was tried.

    `sample` is float32 (n, d) of `rows` vectors, `queries` by kind (q, d), none of them in the sample. Where no choice
    suffices, it is the one that found most. ConfigError: faiss refuses a key.
    """
    truth = {kind: faiss_search.nearest(vectors, sample, TOP)[1] for kind, vectors in queries.items()}
    least, share = 1 - SHARE * (1 - target), min(1.0, len(sample) / rows)
    tried: list[TriedKey] = []
    best: tuple[float, Index, Choice] | None = None
    centroids = clusters.train(sample, lists, seed) if (lists := _shared_lists(choices, len(sample))) else None
    for key, rerank in choices:
        started = time.monotonic()
        index = faiss_index.train(key, sample, seed, centroids)
        faiss_index.add(index, sample, np.arange(len(sample)))
        factors = FACTORS if rerank is None else (rerank,)
        found = {kind: _positions(index, vectors, truth[kind], factors[-1]) for kind, vectors in queries.items()}
        index.reset()
        for factor in factors:
            recalls = {
                kind: {str(k): _recall(places, k, factor, share) for k in DEPTHS} for kind, places in found.items()
            }
            worst = min(by_k[SHOWN] for by_k in recalls.values())
            if worst >= least:
                break
        verdict = f"{worst:.3f} of the rows are among the candidates, {least:.3f} are wanted"
        size, seconds = footprint.code_bytes(key, sample.shape[1]), time.monotonic() - started
        tried.append(TriedKey(key, factor, size, recalls, seconds, verdict))
        progress(f"tried {key}, {f're-ranking {factor} x k' if factor else 'no re-ranking'}: {verdict}")
        if best is None or worst > best[0]:
            best = worst, index, Choice(key, factor)
        if worst >= least:
            break
    assert best is not None
    return best[1], best[2], tried


def _shared_lists(choices: Sequence[Choice], rows: int) -> int:
    """The lists that all choices have, none of which does more to the vectors than rotate them; 0 where they differ."""
    counts = {index_keys.lists(choice.key) for choice in choices}
    alike = len(counts) == 1 and all(re.match(r"(RR\d+,)?IVF", choice.key) for choice in choices)
    return counts.pop() if alike and max(counts) <= rows else 0


def _positions(index: Index, queries: Vectors, truth: Ids, factor: int) -> npt.NDArray[np.int64]:
    """At which places (q, 100) of the index's hits, every list visited, the true neighbours are; -1: at none."""
    depth = candidates(TOP, factor) if factor else TOP
    efforts = faiss_index.efforts(index)
    ids = faiss_search.search(index, queries, min(depth, index.ntotal), efforts[-1] if efforts else None)[1]
    places = np.full((len(queries), truth.shape[1]), -1)
    for query, (hits, wanted) in enumerate(zip(ids, truth, strict=True)):
        order = np.argsort(hits)
        at = np.minimum(np.searchsorted(hits[order], wanted), len(hits) - 1)
        places[query] = np.where(hits[order][at] == wanted, order[at], -1)
    return places


def _recall(places: npt.NDArray[np.int64], k: int, factor: int, share: float) -> float:
    """The share of the true k best of all rows that is among the candidates, as a sample of that share shows it.

    Both are as many fewer in the sample: of a tenth of the rows it is the 10 best, among a tenth of the candidates
    for 100. Codes confuse rows of nearly equal scores, of which the sample has a tenth too.
    """
    depth = candidates(k, factor) if factor else k
    wanted, depth = max(1, round(k * share)), max(1, round(depth * share))
    found = places[:, :wanted]
    return float(np.mean((found >= 0) & (found < max(depth, wanted))))
