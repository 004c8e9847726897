"""Measures two ways to re-rank an index of many shards: the best candidates of all shards, or of each by itself.

    python -m tests.bench.rerank [--rows 200000] [--dim 256] [--shards 16] [--key IVF512,PQ32] [--factors 3 10 30 100]
        [--record]

Queries are vectors of captions that are in no shard; they search images, one at a time. `reads` is the number of
vectors that are read for each query.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from clip_batch.config import MergeConfig
from clip_batch.index.ann import faiss_search
from clip_batch.index.ann.order import best
from clip_batch.index.ann.rerank import candidates, rerank
from clip_batch.index.ann.rows import Stacked
from clip_batch.index.merge.merge import merge
from clip_batch.search.rows import Ids, Vectors
from clip_batch.search.searcher import Searcher
from clip_batch.storage.npy import unit
from tests.bench import result
from tests.bench.realistic import realistic
from tests.fabricated import make_out

QUERIES, K, ROUNDS = 300, 10, 3


class Counted(Stacked):
    """Vectors that count how many of them are read."""

    reads = 0

    def __getitem__(self, rows: Ids) -> np.ndarray:
        self.reads += len(rows)
        return super().__getitem__(rows)


def each_by_itself(searcher: Searcher, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
    """As `Searcher.search_ids`, but each shard re-ranks candidates of its own."""
    depth, effort = candidates(k, searcher.manifest.rerank), searcher.manifest.effort["image"]
    stored = searcher.stored["image"]

    def one(shard: object) -> tuple[Vectors, Ids]:
        _, ids = faiss_search.search(shard.index, queries, min(depth, shard.rows), effort)  # type: ignore[attr-defined]
        return rerank(queries, np.where(ids >= 0, ids + shard.offset, -1), stored, k)  # type: ignore[attr-defined]

    parts = list(searcher._pool.map(one, searcher.indices["image"].parts))
    return best(np.hstack([part[0] for part in parts]), np.hstack([part[1] for part in parts]), k)


def measure(searcher: Searcher, ask: Callable[[Vectors], Ids], queries: Vectors, truth: Ids) -> dict[str, float]:
    """Recall@10, and the reads and milliseconds for each query, of the fastest round."""
    stored = searcher.stored["image"]
    times, found = [], np.empty((0, K), dtype=np.int64)
    for _ in range(ROUNDS):
        stored.reads = 0  # type: ignore[attr-defined]
        began = time.perf_counter()
        found = np.concatenate([ask(query) for query in queries[:, None]])
        times.append(time.perf_counter() - began)
    hits = [len(set(some) & set(right)) for some, right in zip(found.tolist(), truth.tolist(), strict=True)]
    return {
        "recall": round(float(np.mean(hits)) / K, 4),
        "reads": round(stored.reads / len(queries)),  # type: ignore[attr-defined]
        "ms": round(1000 * min(times) / len(queries), 2),
    }


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--key", default="IVF512,PQ32")
    parser.add_argument("--factors", type=int, nargs="+", default=[3, 10, 30, 100])
    parser.add_argument("--effort", type=int, default=0, help="nprobe; 0: as merge tunes it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        *parts, (_, queries) = realistic(options.rows, options.dim, options.rows, QUERIES)
        images, texts = parts[0]
        part = -(-options.rows // 20)
        sizes = [min(part, options.rows - low) for low in range(0, options.rows, part)]
        make_out(f"{home}/out", images, texts, sizes)
        config = MergeConfig(
            modalities=["image"], index_key=options.key, rerank=10, shard_rows=-(-options.rows // options.shards)
        )
        manifest = merge(f"{home}/out", f"{home}/index", config)
        facts = {"key": options.key, "shards": len(manifest.shards), "reported": manifest.recall["image"]["text"]["10"]}
        lines = []
        with Searcher(f"{home}/index") as searcher:
            searcher.stored["image"] = Counted(searcher.stored["image"]._matrices)
            effort = options.effort or manifest.effort["image"]
            vectors = unit(searcher.stored["image"][np.arange(manifest.rows)])
            truth = faiss_search.nearest(queries, vectors, K)[1]
            for factor in options.factors:
                searcher.manifest = replace(manifest, rerank=factor, effort={"image": effort})
                ways = {
                    "all": lambda query: searcher.search_ids(query, K)[1],
                    "each": lambda query: each_by_itself(searcher, query, K)[1],
                }
                for way, ask in ways.items():
                    found = {"factor": factor, "way": way, **measure(searcher, ask, queries, truth)}
                    lines.append(found)
                    print(json.dumps(found), file=sys.stderr)
    facts |= {"rows": options.rows, "dim": options.dim, "effort": effort}
    rows = []
    for all_of_them, each in zip(lines[::2], lines[1::2], strict=True):
        reads = f"{all_of_them['reads']:,} against {each['reads']:,} vectors read"
        what = f"recall@10 in {facts['shards']} shards, `--rerank {all_of_them['factor']}` ({reads})"
        peer = "each shard by itself"
        rows += [
            result.Row(f"factor_{all_of_them['factor']}", what, "", all_of_them["recall"], each["recall"], peer),
            result.Row(
                f"factor_{all_of_them['factor']}_ms",
                "one search of that",
                "ms",
                all_of_them["ms"],
                each["ms"],
                peer,
                round(each["ms"] / all_of_them["ms"], 2),
            ),
        ]
    result.report("rerank", "index", options, rows, {**facts, "ways": lines})


if __name__ == "__main__":
    main()
