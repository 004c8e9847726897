"""Measures whole merges: CPU microseconds a vector, peak memory beside the formula, recall, and how the cost grows.

    python -m tests.bench.merge [--rows 1000000] [--dim 256] [--index-key auto] [--record]
    python -m tests.bench.merge --rows 10000000 --record merge_large
    python -m tests.bench.merge --rows 1000000 8000000 --record merge_growth

Each `clip-batch merge` runs in a process of its own, on vectors like CLIP's, which are written before it; only part of
them is in memory at a time. The formula is the one of docs/merge.md, for the largest of its index shards. With several
sizes, growth is the CPU time a vector of the last over that of the first: 1.0 is in proportion.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from clip_batch.config import MergeConfig
from clip_batch.config.options import to_flags
from clip_batch.index.manifest import load_manifest
from clip_batch.index.merge.job import open_job
from clip_batch.search.searcher import Searcher
from clip_batch.storage.store import Store
from tests.bench import process, result
from tests.bench.realistic import write_out

PART_ROWS, QUERIES = 50_000, 500
LIMIT = 7200
"""Seconds after which a merge is killed."""
MOST_GROWTH = 1.1
"""The growth that is aimed for at most."""


def measure(home: Path, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Write an OUT of `rows` rows, merge it, and ask the index captions one by one."""
    out, index, log = f"{home}/out", f"{home}/index", home / "merge.log"
    started = time.monotonic()
    captions = write_out(out, rows, options.dim, PART_ROWS, QUERIES)[1]
    written = time.monotonic() - started
    config = MergeConfig(
        modalities=options.modalities,
        index_key=options.index_key,
        index_memory=options.index_memory,
        max_memory=options.max_memory,
    )
    command = [sys.executable, "-m", "clip_batch", "merge", "--output", out, "--index", index, *to_flags(config)]
    merged = process.run(command, log, LIMIT)
    print(log.read_text()[-2000:], file=sys.stderr)
    assert merged["exit"] == 0
    manifest, job = load_manifest(Store(index)), open_job(out, f"{home}/none", config)
    with Searcher(index) as searcher:
        searcher.search_ids(captions, 10, options.modalities[0])
        times = []
        for caption in captions:
            started = time.perf_counter()
            searcher.search_ids(caption, 10, options.modalities[0])
            times.append(time.perf_counter() - started)
    return {
        "rows": rows,
        "data_seconds": round(written, 1),
        **merged,
        "cpu_us": round(1e6 * merged["cpu_seconds"] / rows / len(options.modalities), 1),
        "formula_mb": job.needs(max(shard.rows for shard in manifest.shards)) // 10**6,
        "shards": len(manifest.shards),
        "key": manifest.key,
        "effort": manifest.effort,
        "rerank": manifest.rerank,
        "recall": manifest.recall,
        "query_ms": round(1000 * float(np.median(times)), 2),
    }


def main() -> None:
    defaults = MergeConfig()
    parser = result.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--modalities", nargs="+", default=["image"])
    parser.add_argument("--index-key", default=defaults.index_key)
    parser.add_argument("--index-memory", default=defaults.index_memory)
    parser.add_argument("--max-memory", default=defaults.max_memory)
    parser.add_argument("--folder", help="where data and index are for a while; default: the temporary folder")
    options = parser.parse_args()
    merges = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as home:
            merges.append(measure(Path(home), rows, options))
        print(json.dumps(merges[-1]), file=sys.stderr)
    growth = round(merges[-1]["cpu_us"] / merges[0]["cpu_us"], 3)
    figures = {"cores": len(os.sched_getaffinity(0)), "merges": merges, "growth": growth}
    result.report("merge", "index", options, _rows(options, merges, growth), figures)


def _rows(options: argparse.Namespace, merges: list[dict[str, Any]], growth: float) -> list[result.Row]:
    rows = []
    for line in merges:
        end = f"_{line['rows']}" if len(merges) > 1 else ""
        key = ", ".join(dict.fromkeys(line["key"].values()))
        what = f"merge of {line['rows']:,} x {options.dim}, {' and '.join(options.modalities)} vectors, {key}"
        cpu_ms = line["cpu_us"] / 1000
        peak, formula = line["peak_anonymous_mb"], line["formula_mb"]
        rows += [
            result.Row(f"seconds{end}", f"{what}, in {line['shards']} shards", "s", line["seconds"], cpu_ms=cpu_ms),
            result.Row(f"memory{end}", "its peak anonymous memory", "MB", peak, formula, "the formula's bound"),
            result.Row(f"query{end}", "one caption, the median, on all cores", "ms", line["query_ms"]),
        ]
    if len(merges) > 1:
        sizes = f"{merges[0]['rows']:,} to {merges[-1]['rows']:,}"
        rows.append(
            result.Row("growth", f"CPU time a vector, growth from {sizes} rows", "times", growth, target=MOST_GROWTH)
        )
    return rows


if __name__ == "__main__":
    main()
