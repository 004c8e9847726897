"""Measures a merge of clustered vectors: seconds, recall, milliseconds for each query, peak memory.

    python -m tests.bench.merge [--rows 200000] [--dim 128] [--clusters 500] [--index-key auto] [--record]

The clusters overlap (noise of 0.6 of a centre's length), yet are easier than CLIP's vectors.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time

import numpy as np

from clip_batch.config import MergeConfig
from clip_batch.index.merge.merge import merge
from clip_batch.search.searcher import Searcher
from tests.bench import result
from tests.fabricated import clustered, make_out

PARTS = 8


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--index-key", default="auto")
    options = parser.parse_args()
    images, texts = clustered(options.rows, options.dim, options.clusters)
    with tempfile.TemporaryDirectory() as home:
        out, index = f"{home}/out", f"{home}/index"
        sizes = np.diff(np.linspace(0, options.rows, PARTS + 1).astype(int)).tolist()
        make_out(out, images, texts, sizes)
        started, used = time.perf_counter(), time.process_time()
        config = MergeConfig(shard_rows=options.rows // 2, index_key=options.index_key)
        manifest = merge(out, index, config, progress=lambda line: print(line, file=sys.stderr))
        built, cpu = time.perf_counter() - started, time.process_time() - used
        with Searcher(index) as searcher:
            searcher.search_ids(texts[:100], 10)
            started = time.perf_counter()
            for query in texts[:500]:
                searcher.search_ids(query, 10)
            query_ms = (time.perf_counter() - started) / 500 * 1000
    figures = {
        "cores": len(os.sched_getaffinity(0)),
        "seconds": round(built, 1),
        "cpu_seconds": round(cpu, 1),
        "key": manifest.key,
        "effort": manifest.effort,
        "recall": manifest.recall,
        "ms_per_query": round(query_ms, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    what = (
        f"merge of {options.rows:,} x {options.dim}, image and text, {options.index_key} key ({manifest.key['image']})"
    )
    cpu_ms = round(1000 * cpu / options.rows, 4)
    rows = [
        result.Row(
            "seconds", f"{what}, peak {figures['peak_mb']:,} MB with the input", "s", figures["seconds"], cpu_ms=cpu_ms
        ),
        result.Row("query", f"one search of it, effort {manifest.effort['image']}", "ms", figures["ms_per_query"]),
    ]
    result.report("merge", "index", options, rows, figures)


if __name__ == "__main__":
    main()
