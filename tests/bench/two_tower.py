"""Measures what a caption costs to search beside an image, on vectors of two real towers (`tests/bench/scenes.py`).

    python -m tests.bench.two_tower [--rows 100000] [--queries 1000] [--lists 2 1 4] [--home DIR] [--record]

Queries are scenes of the demo's pictures that are not in the set: their images, their captions, and their captions in
other words. Inverted files have `--lists` times the square root of the rows, and exact codes (flat) or RaBitQ codes of
one bit of which the best 30 * k candidates are scored exactly (rabitq). A query visits the lists of the nearest
centroids, or those that merge's own predictor predicts (predicted), which has learned from the training rows alone. For
each it tells the least effort at which recall at k = 10 and 100 is .95, the lists visited and rows scored then,
milliseconds of CPU for each query (one by one, re-ranking included), and the depth: how many times k candidates must
be re-ranked for .99 of the recall of 30 * k.

`--home` keeps the data there, and goes on with what is there; --rows must then be the same. One core makes some 500
pairs of vectors a second: scenes are composed as arrays of the model's size, without JPEG files.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_batch.embeddings import reader
from clip_batch.index.ann import faiss_index, faiss_search, shared_lists
from clip_batch.index.ann.predictor import Predictor
from clip_batch.index.ann.rerank import rerank
from clip_batch.index.ann.shared_lists import Probe, SharedLists
from clip_batch.index.merge import predict
from clip_batch.index.merge.train import LEAST_SAMPLE
from clip_batch.storage import npy
from clip_batch.storage.store import Store
from tests.bench import result, scenes

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Assign = Callable[[Vectors, float], Probe]
"""The lists that queries visit at an effort."""

TARGET, DEPTHS = 0.95, (10, 100)
RERANK = 30
ANY_ROWS = 10**9
"""Rows for which a predictor is always learned."""
TIMED, ROUNDS = 200, 3
KEYS = {"flat": "IVF{lists},Flat", "rabitq": "RR{dim},IVF{lists},RaBitQfs"}
NAMES = {"image": "an image", "caption": "a caption", "paraphrase": "a caption in other words"}


def geometry(images: Vectors, texts: Vectors) -> dict[str, Any]:
    """How the towers stand to each other: mean cosines, the distance of their means, the dimensions that vary."""
    order = np.random.default_rng(0).permutation(len(texts))

    def cosine(some: Vectors, others: Vectors) -> float:
        return _round(np.einsum("nd,nd->n", some, others).mean())

    return {
        "cosine_of_pairs": cosine(images, texts),
        "cosine_of_strangers": cosine(images, texts[order]),
        "cosine_of_images": cosine(images, images[order]),
        "cosine_of_captions": cosine(texts, texts[order]),
        "distance_of_means": _round(np.linalg.norm(images.mean(axis=0) - texts.mean(axis=0))),
        "image_dimensions": _dimensions(images),
        "text_dimensions": _dimensions(texts),
    }


def _dimensions(vectors: Vectors) -> dict[str, float]:
    """Principal components that have half, .9 and .95 of the variance, and the participation ratio of all."""
    spectrum = np.linalg.eigvalsh(np.cov(vectors, rowvar=False))[::-1]
    shares = np.cumsum(spectrum) / spectrum.sum()
    counts = {str(share): int(np.searchsorted(shares, share)) + 1 for share in (0.5, 0.9, 0.95)}
    return {**counts, "participation": _round(spectrum.sum() ** 2 / (spectrum**2).sum(), 1)}


class Measured:
    """An index of the set's image vectors (rows, d), and the predictors of each kind of query."""

    def __init__(self, key: str, images: Vectors, texts: Vectors) -> None:
        rows, lists = len(images), int(key.partition("IVF")[2].partition(",")[0])
        order = np.random.default_rng(0).permutation(rows)
        sample = images[order[: max(LEAST_SAMPLE, 64 * lists)]]
        index = faiss_index.train(key, sample)
        self.of_row = faiss_index.assigner(index)(images)
        faiss_index.add(index, images, np.arange(rows), self.of_row)
        self.index = index  # which owns what `shared` points to
        shared = shared_lists.share([index])
        assert shared is not None
        self.shared: SharedLists = shared
        self.reranks, self.stored = "RaBitQ" in key, images.astype(np.float16)
        self.sizes = np.append(np.bincount(self.of_row, minlength=lists), 0)  # the last is of -1: no list

        def captions(_: str, count: int) -> Vectors:
            return texts[order[-count:]]

        started = time.process_time()
        learned = predict.learn(index, "image", ANY_ROWS, sample, ("image", "text"), captions, seed=0)
        self.learn_seconds = _round(time.process_time() - started)
        self.predictors = {"image": learned["image"], "caption": learned["text"], "paraphrase": learned["text"]}

    def visiting(self, predictor: Predictor | None, queries: Vectors, effort: float) -> Probe:
        """The lists that a predictor chooses, or without one those of the `effort` nearest centroids."""
        return shared_lists.probe(self.shared, queries, math.ceil(effort), predictor)

    def search(self, assign: Assign, queries: Vectors, k: int, effort: float) -> Ids:
        """The rows found, (n, k)."""
        probe = assign(queries, effort)
        depth = RERANK * k if self.reranks else k
        ids = shared_lists.search(self.shared, 0, probe, depth, shared_lists.parameters(probe))[1]
        return rerank(queries, ids, self.stored, k)[1] if self.reranks else ids

    def depth(self, assign: Assign, queries: Vectors, truth: Ids, effort: float) -> int:
        """How many times k candidates of a search must be re-ranked to keep .99 of the recall of all that are."""
        k = truth.shape[1]
        probe = assign(queries, effort)
        ids = shared_lists.search(self.shared, 0, probe, RERANK * k, shared_lists.parameters(probe))[1]

        def recall(factor: int) -> float:
            return _recall(rerank(queries, ids[:, : factor * k], self.stored, k)[1], truth)

        least = 0.99 * recall(RERANK)
        return next(factor for factor in (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, RERANK) if recall(factor) >= least)

    def cost(self, assign: Assign, queries: Vectors, truth: Ids) -> dict[str, Any]:
        """The least effort for the target, and what it costs; exact codes find what is in the lists they visit."""
        k = truth.shape[1]

        def seen(effort: float) -> float:
            chosen = assign(queries, effort).lists
            visited = np.zeros((len(queries), len(self.sizes)), dtype=bool)
            np.put_along_axis(visited, chosen, True, 1)
            return float(np.take_along_axis(visited, self.of_row[truth], 1).mean())

        def found(effort: float) -> float:
            return _recall(self.search(assign, queries, k, effort), truth) if self.reranks else seen(effort)

        efforts = [1.03**step for step in range(400) if 1.03**step < len(self.sizes)]
        place = _first(efforts, seen)
        while found(efforts[place]) < TARGET and place + 1 < len(efforts):
            place += 1
        effort, chosen = efforts[place], assign(queries, efforts[place]).lists
        times = []
        for _ in range(ROUNDS):
            started = time.thread_time()
            for query in queries[:TIMED, None]:
                self.search(assign, query, k, effort)
            times.append(time.thread_time() - started)
        return {
            "effort": _round(effort, 1),
            "lists": _round((chosen >= 0).sum(axis=1).mean(), 1),
            "rows": round(float(self.sizes[chosen].sum(axis=1).mean())),
            "ms": _round(1000 * min(times) / TIMED),
            "recall": _round(found(effort), 4),
            **({"depth": self.depth(assign, queries[:TIMED], truth[:TIMED], effort)} if self.reranks else {}),
        }


def _recall(rows: Ids, truth: Ids) -> float:
    """The mean share of the true rows (n, k) that are among the rows found (n, k)."""
    return float(np.mean([np.isin(some, right).mean() for some, right in zip(rows, truth, strict=True)]))


def _round(value: float, digits: int = 3) -> float:
    return round(float(value), digits)


def _first(efforts: Sequence[float], recall: Callable[[float], float]) -> int:
    """The position of the least of ascending efforts that reaches the target, or of the last."""
    low, high = -1, len(efforts) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if recall(efforts[middle]) >= TARGET else (middle, high)
    return high


def measure(built: Measured, queries: dict[str, Vectors], truth: dict[str, Ids]) -> dict[str, Any]:
    """Costs by kind of query, "nearest" or "predicted", and depth."""
    costs: dict[str, Any] = {}
    for kind, some in queries.items():
        ways: dict[str, Assign] = {
            "nearest": partial(built.visiting, None),
            "predicted": partial(built.visiting, built.predictors[kind]),
        }
        costs[kind] = {
            way: {str(k): built.cost(assign, some, truth[kind][:, :k]) for k in DEPTHS} for way, assign in ways.items()
        }
    return costs


def data(home: Path, options: argparse.Namespace) -> tuple[Vectors, Vectors, dict[str, Vectors], float]:
    """The set's image and text vectors (rows, d) of unit norm, queries by kind, seconds to make them."""
    started = time.monotonic()
    queries = scenes.make_queries(options.queries)
    plan = scenes.make_out(home / "out", options.rows)
    seconds = round(time.monotonic() - started, 1)
    source = reader.open_embeddings(Store(str(home / "out")), plan)
    images, texts = (npy.unit(source.read_vectors(kind, 0, source.rows)) for kind in ("image", "text"))
    return images, texts, queries, seconds


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--lists", type=float, nargs="+", default=[2.0, 1.0, 4.0], help="times the root of the rows")
    parser.add_argument("--home", help="keep the data there, and go on with what is there")
    options = parser.parse_args()
    faiss_index.use_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        images, texts, queries, seconds = data(Path(options.home or temporary), options)
    truth = {kind: faiss_search.nearest(some, images, max(DEPTHS))[1] for kind, some in queries.items()}
    costs, learn_seconds = {}, {}
    for factor in options.lists:
        for template in KEYS.values():
            key = template.format(lists=round(factor * math.sqrt(options.rows)), dim=images.shape[1])
            built = Measured(key, images, texts)
            costs[key], learn_seconds[key] = measure(built, queries, truth), built.learn_seconds
            print(key, built.learn_seconds, costs[key], file=sys.stderr)
    figures = {"encode_seconds": seconds, "learn_seconds": learn_seconds, "geometry": geometry(images, texts)}
    result.report("two_tower", "index", options, _rows(options, costs), {**figures, "costs": costs})


def _rows(options: argparse.Namespace, costs: dict[str, Any]) -> list[result.Row]:
    """The figures of the first number of lists, predicted beside nearest."""
    (flat, exact), (coded, quick) = list(costs.items())[:2]
    peer, rows = "nearest centroids", []
    for k in map(str, DEPTHS):
        for kind, name in NAMES.items():
            ours, theirs = (exact[kind][way][k]["rows"] for way in ("predicted", "nearest"))
            what = f"rows scored for {name}, recall@{k} {TARGET}, `{flat}` of {options.rows:,} scenes"
            rows.append(result.Row(f"{kind}_{k}", what, "", ours, theirs, peer, round(theirs / ours, 2)))
            ours, theirs = (quick[kind][way][k]["ms"] for way in ("predicted", "nearest"))
            what = f"one search for {name}, recall@{k} {TARGET}, `{coded}`, {RERANK} k re-ranked, CPU"
            rows.append(result.Row(f"{kind}_{k}_ms", what, "ms", ours, theirs, peer, round(theirs / ours, 2)))
        for kind in ("caption", "paraphrase"):
            mine, other = (
                round(exact[kind][way][k]["rows"] / exact["image"][way][k]["rows"], 2)
                for way in ("predicted", "nearest")
            )
            what = f"rows scored for {NAMES[kind]}, times those for an image, recall@{k} {TARGET}, `{flat}`"
            rows.append(result.Row(f"{kind}_{k}_ratio", what, "", mine, other, peer, None, "at most 1.3"))
    return rows


if __name__ == "__main__":
    main()
