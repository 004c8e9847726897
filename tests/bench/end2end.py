"""Measures images a second of end2end, from a web server on this machine.

    python -m tests.bench.end2end --img2dataset .img2dataset/bin/img2dataset [--urls 4000] [--side 512] [--model demo]
        [--record]

The server is a process of its own and shares the cores. `download_s` is by img2dataset's own clock; `rest_s` is what
plan, embed and merge take after it, and `again_s` is a second run, which finds all of it done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench import result
from tests.servers.webserver import image, web

IMAGES = 200
"""Number of different images, which are requested in turn."""


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--img2dataset", default="img2dataset")
    parser.add_argument("--urls", type=int, default=4000)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.side)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    size = f"{options.urls:,} URLs of JPEGs of {options.side} pixels"
    rows = [
        result.Row("download", f"{size} downloaded by img2dataset", "images/s", figures["downloaded_a_second"]),
        result.Row(
            "whole", f"{size}, from the list to an index, {options.model}", "images/s", figures["end2end_a_second"]
        ),
        result.Row("again", "a second run, which finds all of it done", "s", figures["again_s"]),
    ]
    result.report("end2end", "launch", options, rows, figures)


def serve(side: int) -> None:
    """Run the web server until our standard input ends."""
    with web() as server:
        server.side = side
        for seed in range(IMAGES):
            image(seed, side)
        print(server.url, flush=True)
        sys.stdin.read()
    sys.exit()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.end2end", "--serve", "--side", str(options.side)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    url = server.stdout.readline().strip()
    lines = [f"{url}/good/{number % IMAGES}.jpg?{number},image {number}" for number in range(options.urls)]
    (folder / "list.csv").write_text("\n".join(["url,caption", *lines]) + "\n")
    line = [sys.executable, "-m", "clip_batch", "end2end", "--urls", str(folder / "list.csv"), "--no-serve"]
    line += ["--output", str(folder / "dir"), "--img2dataset", options.img2dataset, "--shard-samples", "500"]
    line += ["--model", options.model, "--no-progress", "--json"]
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        taken.append(time.perf_counter() - started)
    server.communicate()
    stats = [json.loads(path.read_text()) for path in (folder / "dir/images").glob("*_stats.json")]
    download = max(one["end_time"] for one in stats) - min(one["start_time"] for one in stats)
    embedded = json.loads(done.stdout)["embedded"]
    return {
        "embedded": embedded,
        "download_s": round(download, 1),
        "rest_s": round(taken[0] - download, 1),
        "again_s": round(taken[1], 1),
        "downloaded_a_second": round(embedded / download, 1),
        "end2end_a_second": round(embedded / taken[0], 1),
    }


if __name__ == "__main__":
    main()
