"""Measures what `clip-batch sweep` costs, and what it recommends.

    python -m tests.bench.sweep [--rows 100000] [--keys Flat ...] [--record]

Vectors are made up: clusters in 512 dimensions, with captions near their images. The table is printed on standard error
as it grows.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import asdict

from clip_batch.config import MergeConfig, SweepConfig
from clip_batch.index.merge.sweep import describe, sweep
from tests.bench import result
from tests.fabricated import clustered, make_out


def main() -> None:
    parser = result.parser(__doc__)
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
    seconds = round(time.monotonic() - started, 1)
    rows = [result.Row("seconds", f"sweep of {options.rows:,} x {options.dim}", "s", seconds)]
    result.report("sweep", "index", options, rows, {"seconds": seconds, "sweep": asdict(found)})


if __name__ == "__main__":
    main()
