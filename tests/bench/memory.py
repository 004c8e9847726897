"""Memory of merge's tasks against the formula of docs/merge.md, by shard size, key and size of OUT; as JSON.

    python -m tests.bench.memory [--rows 400000] [--dim 256]

Each task runs as `clip-batch merge --task ...` in a process of its own. `anonymous_mb` is the largest
RssAnon seen (what a memory limit counts in the end: pages of mapped files can be dropped), `peak_mb` VmHWM.
"""

from __future__ import annotations

import argparse
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
from tests.fabricated import clustered, make_out

PARTS = 20
KEYS = ("Flat", "IVF256,SQ8", "OPQ32,IVF256_HNSW32,PQ32x4fs", "HNSW16")


def run(*words: str) -> dict[str, int]:
    """Peaks in MB of a process that ends well."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--dim", type=int, default=256)
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as home:
        for share in (1, 4):
            rows = arguments.rows // share
            images, texts = clustered(rows, arguments.dim, 1000)
            sizes = np.diff(np.linspace(0, rows, PARTS + 1).astype(int)).tolist()
            make_out(f"{home}/{share}", images, texts, sizes)
            del images, texts
        for share, key, shard_rows in [
            *((1, key, arguments.rows // 4) for key in KEYS),
            (1, "IVF256,SQ8", arguments.rows),
            (4, "IVF256,SQ8", arguments.rows // 4),
        ]:
            out, index = f"{home}/{share}", f"{home}/{share}-{key}-{shard_rows}"
            config = replace(MergeConfig(), index_key=key, shard_rows=shard_rows)
            flags = ["merge", "--output", out, "--index", index, *to_flags(config)]
            job = open_job(out, index, config)
            line = {"rows": job.source.rows, "dim": arguments.dim, "key": key, "shard_rows": shard_rows}
            line["train"] = run(*flags, "--task", "train")
            line["shard"] = run(*flags, "--task", "shards", "--slot", "0", "--slots", str(job.shards))
            line["formula_mb"] = job.needs(shard_rows) // 10**6
            lines.append(line)
            print(json.dumps(line), file=sys.stderr)
    print(json.dumps({"benchmark": "memory", "tasks": lines}))


if __name__ == "__main__":
    main()
