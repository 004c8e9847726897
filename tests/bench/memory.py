"""Measures the memory of merge's tasks beside the formula of docs/merge.md, by shard size, key and size of OUT.

    python -m tests.bench.memory [--rows 400000] [--dim 256] [--record]

Each task runs as `clip-batch merge --task ...` in a process of its own. `anonymous_mb` is the largest RssAnon that was
seen: what a memory limit counts in the end, as pages of mapped files can be dropped. `peak_mb` is VmHWM.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from clip_batch.config import MergeConfig
from clip_batch.config.options import to_flags
from clip_batch.index.merge.job import open_job
from tests.bench import result
from tests.fabricated import clustered, make_out

PARTS = 20
KEYS = ("Flat", "IVF256,SQ8", "OPQ32,IVF256_HNSW32,PQ32x4fs", "HNSW16")


def run(*words: str) -> dict[str, int]:
    """Run a clip-batch command that must end well; returns its peaks in MB."""
    process = subprocess.Popen([sys.executable, "-m", "clip_batch", *words], stdout=subprocess.DEVNULL)
    anonymous = peak = 0
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = dict(re.findall(r"^(RssAnon|VmHWM):\s+(\d+)", text, re.MULTILINE))
        anonymous, peak = max(anonymous, int(found.get("RssAnon", 0))), max(peak, int(found.get("VmHWM", 0)))
        time.sleep(0.005)
    assert process.wait() == 0, words
    return {"anonymous_mb": anonymous // 1024, "peak_mb": peak // 1024}


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
            line["train"] = run(*flags, "--task", "train")
            line["shard"] = run(*flags, "--task", "shards", "--slot", "0", "--slots", str(job.shards))
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
