"""merge of clustered vectors: seconds, recall, milliseconds a query, peak memory; as JSON.

python tests/bench/merge.py [--rows 200000] [--dim 128] [--clusters 500] [--index-key auto]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from clip_batch.config import MergeConfig
from clip_batch.index.merge.merge import merge
from clip_batch.search.searcher import Searcher
from tests.fabricated import clustered, make_out

PARTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--index-key", default="auto")
    arguments = parser.parse_args()
    images, texts = clustered(arguments.rows, arguments.dim, arguments.clusters)
    with tempfile.TemporaryDirectory() as home:
        out, index = f"{home}/out", f"{home}/index"
        sizes = np.diff(np.linspace(0, arguments.rows, PARTS + 1).astype(int)).tolist()
        make_out(out, images, texts, sizes)
        started = time.perf_counter()
        config = MergeConfig(shard_rows=arguments.rows // 2, index_key=arguments.index_key)
        manifest = merge(out, index, config, progress=lambda line: print(line, file=sys.stderr))
        built = time.perf_counter() - started
        with Searcher(index) as searcher:
            searcher.search_ids(texts[:100], 10)
            started = time.perf_counter()
            for query in texts[:500]:
                searcher.search_ids(query, 10)
            query_ms = (time.perf_counter() - started) / 500 * 1000
    print(
        json.dumps(
            {
                "benchmark": "merge",
                **vars(arguments),
                "cores": len(os.sched_getaffinity(0)),
                "seconds": round(built, 1),
                "key": manifest.key,
                "effort": manifest.effort,
                "recall": manifest.recall,
                "ms_per_query": round(query_ms, 2),
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
