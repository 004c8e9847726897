"""Measures a search for very many hits, without their metadata, by faiss alone and through Searcher.

    python -m tests.bench.knn --output OUT [--key IVF1024,PQ64x4fs] [--k 100000] [--efforts 128 256] [--record]

OUT is first merged into an index in a temporary folder. Queries run one at a time; figures are medians of 30.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from clip_batch.config import MergeConfig
from clip_batch.index.ann import faiss_search
from clip_batch.index.merge.merge import merge
from clip_batch.search.searcher import Searcher
from tests.bench import result

QUERIES = 30


def milliseconds(work: Callable[[int], Any]) -> float:
    """The median over the queries, each of which runs twice; the second time counts."""
    taken = []
    for number in [*range(QUERIES), *range(QUERIES)]:
        started = time.perf_counter()
        work(number)
        taken.append(time.perf_counter() - started)
    return round(1000 * statistics.median(taken[QUERIES:]), 2)


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--key", default="IVF1024,PQ64x4fs")
    parser.add_argument("--k", type=int, default=100_000)
    parser.add_argument("--efforts", type=int, nargs="*", default=[128, 256])
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home:
        config = MergeConfig(index_key=options.key, modalities=["image"], queries=100)
        manifest = merge(options.output, f"{home}/index", config)
        with Searcher(f"{home}/index") as searcher:
            queries = searcher.reconstruct(range(0, manifest.rows, manifest.rows // QUERIES))
            (shard,) = searcher.indices["image"].parts
            for effort in options.efforts:
                found[f"effort {effort}"] = {
                    "hits": int((searcher.search_ids(queries[0], options.k, effort=effort)[1] >= 0).sum()),
                    "faiss_ms": milliseconds(
                        lambda i, effort=effort: faiss_search.search(shard.index, queries[i : i + 1], options.k, effort)  # type: ignore[misc]
                    ),
                    "searcher_ms": milliseconds(
                        lambda i, effort=effort: searcher.search_ids(queries[i], options.k, effort=effort)  # type: ignore[misc]
                    ),
                }
    size = f"{options.k:,} hits of {manifest.rows:,} x {manifest.dim} without metadata, {options.key}"
    rows = [
        result.Row(
            f"effort_{effort}",
            f"{size}, effort {effort}",
            "ms",
            (line := found[f"effort {effort}"])["searcher_ms"],
            line["faiss_ms"],
            "the index alone",
            round(line["faiss_ms"] / line["searcher_ms"], 2),
        )
        for effort in options.efforts
    ]
    result.report("knn", "search", options, rows, {"rows": manifest.rows, **found})


if __name__ == "__main__":
    main()
