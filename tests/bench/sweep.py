"""What `clip-batch sweep` costs and finds: python tests/bench/sweep.py [--rows 100000] [--keys Flat ...].

Fabricated vectors of 512 dimensions in clusters, captions near their images. Prints the table on
standard error as it grows, and JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from clip_batch.config import MergeConfig, SweepConfig
from clip_batch.index.merge.sweep import describe, sweep
from tests.fabricated import clustered, make_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--keys", nargs="*", default=[])
    options = parser.parse_args()
    images, texts = clustered(options.rows, options.dim, options.rows // 100)
    with tempfile.TemporaryDirectory() as folder:
        make_out(folder, images, texts, [options.rows // 4] * 4)
        del images, texts
        config = MergeConfig(modalities=["image"], queries=options.queries, index_memory="1GB")
        started = time.monotonic()
        found = sweep(
            folder,
            config,
            options=SweepConfig(options.keys, options.rows),
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    print(describe(found), file=sys.stderr)
    print(json.dumps({"seconds": round(time.monotonic() - started, 1), **asdict(found)}, indent=1))


if __name__ == "__main__":
    main()
