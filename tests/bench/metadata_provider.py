"""Measures rows of metadata a second by id, beside clip-retrieval's own Arrow provider, in one run.

    python -m tests.bench.metadata_provider [--rows 1000000] [--python .clip-retrieval/bin/python] [--record]

Both answer with URL and caption of the same rows, from a file of ours and from one as clip-retrieval writes it.
`columnar` is an Arrow table, `dicts` are Python's, with which both services answer. clip-retrieval gives dicts only, so
both of ours are compared with those. Rounds alternate, and the best of each counts.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from clip_batch.index import metadata, metadata_writer
from tests.bench import result
from tests.bench.metadata import parts

COLUMNS = ["url", "caption"]

THEIRS = """
import json, sys, time
from clip_retrieval.clip_back import ArrowMetadataProvider
provider = ArrowMetadataProvider(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    ids = json.loads(line)
    started = time.perf_counter()
    rows = provider.get(ids, ["url", "caption"])
    print(json.dumps([time.perf_counter() - started, rows[-1]["url"]]), flush=True)
"""


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--python", default=os.environ.get("CLIP_RETRIEVAL_PYTHON", ".clip-retrieval/bin/python"))
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    starts = rng.integers(0, options.rows - 10_000, 10)
    asked = {
        "near_100k": np.concatenate([start + np.arange(10_000) for start in starts]),
        "random_20k": rng.integers(0, options.rows, 20_000),
        "random_1k": rng.integers(0, options.rows, 1000),
        "random_20": rng.integers(0, options.rows, 20),
    }
    best: dict[str, dict[str, float]] = {name: {} for name in asked}
    with tempfile.TemporaryDirectory() as home:
        metadata_writer.write_ordered(parts(options.rows), np.arange(options.rows), f"{home}/ours.arrow")
        os.mkdir(f"{home}/theirs")
        tables = parts(options.rows)
        first = next(tables)
        with pa.OSFile(f"{home}/theirs/0.arrow", "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)
        ours = metadata.MetadataFile(f"{home}/ours.arrow")
        command = [options.python, "-c", THEIRS, f"{home}/theirs"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as peer:
            assert peer.stdin and peer.stdout
            peer.stdout.readline()
            for _ in range(options.rounds):
                for name, ids in asked.items():
                    times = {"columnar": seconds(functools.partial(ours.take, ids, COLUMNS))}
                    times["dicts"] = seconds(lambda ids=ids: ours.take(ids, COLUMNS).to_pylist())  # type: ignore[misc]
                    peer.stdin.write(json.dumps(ids.tolist()) + "\n")
                    peer.stdin.flush()
                    times["clip_retrieval"], last = json.loads(peer.stdout.readline())
                    assert last == ours.take(ids[-1:])["url"][0].as_py(), "the rows differ"
                    best[name] = {kind: min(value, best[name].get(kind, value)) for kind, value in times.items()}
            peer.stdin.close()
    report = {
        name: {f"{kind}_rows_per_second": round(len(asked[name]) / value) for kind, value in times.items()}
        | {f"{kind}_ratio": round(times["clip_retrieval"] / times[kind], 1) for kind in ("dicts", "columnar")}
        for name, times in best.items()
    }
    rows = [
        result.Row(
            name,
            f"url and caption of {len(ids):,} {name.partition('_')[0]} rows of {options.rows:,}, as dicts "
            f"(as Arrow columns {report[name]['columnar_ratio']} times)",
            "rows/s",
            report[name]["dicts_rows_per_second"],
            report[name]["clip_retrieval_rows_per_second"],
            "clip-retrieval's Arrow provider",
            report[name]["dicts_ratio"],
        )
        for name, ids in asked.items()
    ]
    result.report("metadata_provider", "index", options, rows, report)


if __name__ == "__main__":
    main()
