"""Measures the memory of merge's tasks beside the formula of docs/merge.md, by shard size, key and size of OUT.

    python -m tests.bench.memory [--rows 400000] [--dim 256] [--record]

Each task runs as `clip-batch merge --task ...` in a process of its own. `anonymous_mb` is the largest RssAnon that was
seen: what a memory limit counts in the end, as pages of mapped files can be dropped. `peak_mb` is VmHWM.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from clip_batch.config import MergeConfig
from clip_batch.config.options import to_flags
from clip_batch.index.merge.job import open_job
from tests.bench import result
from tests.bench.process import run
from tests.fabricated import clustered, make_out

PARTS = 20
KEYS = ("Flat", "IVF256,SQ8", "OPQ32,IVF256_HNSW32,PQ32x4fs", "HNSW16")


def peaks(log: Path, *words: str) -> dict[str, int]:
    """Run a clip-batch command that must end well; returns its peaks in MB."""
    found = run([sys.executable, "-m", "clip_batch", *words], log, 3600)
    assert found["exit"] == 0, log.read_text()
    return {"anonymous_mb": found["peak_anonymous_mb"], "peak_mb": found["peak_mb"]}


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--dim", type=int, default=256)
    options = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as home:
        for share in (1, 4):
            rows = options.rows // share
            images, texts = clustered(rows, options.dim, 1000)
            sizes = np.diff(np.linspace(0, rows, PARTS + 1).astype(int)).tolist()
            make_out(f"{home}/{share}", images, texts, sizes)
            del images, texts
        for share, key, shard_rows in [
            *((1, key, options.rows // 4) for key in KEYS),
            (1, "IVF256,SQ8", options.rows),
            (4, "IVF256,SQ8", options.rows // 4),
        ]:
            out, index = f"{home}/{share}", f"{home}/{share}-{key}-{shard_rows}"
            config = replace(MergeConfig(), index_key=key, shard_rows=shard_rows)
            flags = ["merge", "--output", out, "--index", index, *to_flags(config)]
            job = open_job(out, index, config)
            line = {"rows": job.source.rows, "dim": options.dim, "key": key, "shard_rows": shard_rows}
            line["train"] = peaks(Path(home, "train.log"), *flags, "--task", "train")
            shard = "--task", "shards", "--slot", "0", "--slots", str(job.shards)
            line["shard"] = peaks(Path(home, "shard.log"), *flags, *shard)
            line["formula_mb"] = job.needs(shard_rows) // 10**6
            lines.append(line)
            print(json.dumps(line), file=sys.stderr)
    rows = [
        result.Row(
            f"{line['key']} {line['shard_rows']} of {line['rows']}",
            f"anonymous memory of a shard task, {line['shard_rows']:,} of {line['rows']:,} rows: {line['key']}",
            "MB",
            line["shard"]["anonymous_mb"],
            line["formula_mb"],
            "the formula's bound",
        )
        for line in lines
    ]
    result.report("memory", "index", options, rows, {"tasks": lines})


if __name__ == "__main__":
    main()
