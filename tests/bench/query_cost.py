"""Measures what one query costs beyond the comparing: shards, Python, locks, metadata.

    python -m tests.bench.query_cost [--rows 40000] [--dim 512] [--shards 8] [--key IVF1024,Flat] [--record]

Made-up vectors are merged into small shards, which are asked one vector at a time at nprobe 1, so that there is hardly
anything to compare. The peer is what each query did before the shards shared an assignment to lists: a search of each
shard by itself in a pool of threads, then the merge of their hits. Both ways take turns; the fastest round counts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from clip_batch.config import MergeConfig
from clip_batch.index.ann import faiss_search
from clip_batch.index.ann.order import best
from clip_batch.index.ann.shards import OpenedIndex
from clip_batch.index.merge.merge import merge
from clip_batch.search.find import find
from clip_batch.search.query import Criteria
from clip_batch.search.rows import Ids, Vectors
from clip_batch.search.searcher import Searcher
from tests.bench import result
from tests.fabricated import clustered, make_out

K, QUERIES, ROUNDS = 10, 200, 8


def shard_by_shard(searcher: Searcher, query: Vectors, effort: int) -> tuple[Vectors, Ids]:
    """The hits of `Searcher.search_ids`, each shard searched by itself by a thread of the pool."""

    def one(shard: OpenedIndex) -> tuple[Vectors, Ids]:
        scores, ids = faiss_search.search(shard.index, query[None], K, effort, shard.removed)
        return np.where(ids >= 0, scores, -np.inf), np.where(ids >= 0, ids + shard.offset, -1)

    parts = list(searcher._pool.map(one, searcher.indices["image"].parts))
    return best(np.hstack([part[0] for part in parts]), np.hstack([part[1] for part in parts]), K)


def milliseconds(ask: Callable[[Vectors], Any], queries: Vectors, clients: int) -> float:
    """The milliseconds from one answer to the next, where `clients` threads ask at once."""

    def some(client: int) -> None:
        for query in queries[client::clients]:
            ask(query)

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(lambda _: time.sleep(0.01), range(clients)))
        began = time.perf_counter()
        list(threads.map(some, range(clients)))
        return 1000 * (time.perf_counter() - began) / len(queries)


def measure(ways: dict[str, Callable[[Vectors], Any]], queries: Vectors, clients: Sequence[int]) -> dict[str, float]:
    """The milliseconds of the fastest round of each way, by its name and the number of clients."""
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for count in clients:
            for way, ask in ways.items():
                times.setdefault(f"{way}_{count}", []).append(milliseconds(ask, queries, count))
    return {name: round(min(taken), 3) for name, taken in times.items()}


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--key", default="IVF1024,Flat")
    parser.add_argument("--effort", type=int, default=1, help="nprobe")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    images, texts = clustered(options.rows, options.dim, options.rows // 100)
    with tempfile.TemporaryDirectory() as home:
        part = -(-options.rows // options.shards)
        make_out(f"{home}/out", images, texts, [part] * options.shards)
        config = MergeConfig(modalities=["image"], index_key=options.key, shard_rows=part, queries=100)
        shards = len(merge(f"{home}/out", f"{home}/index", config).shards)
        queries, effort = texts[:: -(-len(texts) // QUERIES)], options.effort
        with Searcher(f"{home}/index") as searcher:
            criteria = Criteria(k=K, effort=effort)
            ways: dict[str, Callable[[Vectors], Any]] = {
                "each": lambda query: shard_by_shard(searcher, query, effort),
                "ids": lambda query: searcher.search_ids(query, K, effort=effort),
                "find": lambda query: find(searcher, query, criteria),
                "metadata": lambda query: searcher.search(query, K, effort=effort),
            }
            for query in queries[:20]:
                assert np.array_equal(ways["each"](query)[1], ways["ids"](query)[1])
            found = measure(ways, queries, options.clients)
    print(found, file=sys.stderr)
    size = f"{shards} shards of {options.rows:,} x {options.dim}, {options.key} at nprobe {effort}, k = {K}"
    rows = []
    for count in options.clients:
        ours, peer, who = found[f"ids_{count}"], found[f"each_{count}"], f"{count} client{'s' * (count > 1)}"
        ratio = round(peer / ours, 2)
        what = f"one query of {who} without metadata, {size}"
        rows.append(result.Row(f"ids_{count}", what, "ms", ours, peer, "each shard by itself", ratio))
        full = found[f"metadata_{count}"]
        rows.append(result.Row(f"metadata_{count}", f"that query with metadata, {who}", "ms", full))
    result.report("query_cost", "search", options, rows, {"shard_count": shards, **found})


if __name__ == "__main__":
    main()
