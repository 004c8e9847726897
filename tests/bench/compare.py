"""Indexes the same vectors by autofaiss, by clip-retrieval's `index`, by plain HNSW and by clip-batch's merge.

    python -m tests.bench.compare [--rows 1000000] [--dim 512] [--modes defaults equal] [--runs 3] [--record]

Image vectors alone are indexed. With `defaults` every contender runs with no option but its input and output; with
`equal` the served index and the build may take the same memory (`--memory`, `--build-memory`), and HNSW, which has no
such option, is left out. Each contender builds in a process of its own, one after another. Its figures are the seconds
and CPU seconds of the build and its peak memory, resident and anonymous (file pages left out). A build that takes over
`--limit` seconds is killed, and reported so. Then `tests.bench.ask` asks the index held-out images and captions of
other images: recall@10 and @100, and milliseconds one by one on one thread, as it would be served and at the least
effort that reaches recall .95; captions a second, p50 and p99 with 1 and with 8 clients on all cores; and the memory of
the process that served them. All contenders get the OpenBLAS kernels that fit the CPU, which merge chooses by itself.

With `--runs` all of it is repeated, the contenders taking turns. The result has every run and the median.

clip-retrieval runs with the interpreter that CLIP_RETRIEVAL_PYTHON names, else with .clip-retrieval/bin/python, and is
left out where there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_batch.config import parse_bytes
from clip_batch.embeddings import reader
from clip_batch.index.ann import faiss_search
from clip_batch.index.ann.libfaiss import openblas_core
from clip_batch.plan.plan import load_plan
from clip_batch.storage import npy
from clip_batch.storage.store import Store
from tests import ROOT
from tests.bench import ask, process, result
from tests.bench.realistic import write_out

PART_ROWS = 50_000
QUERIES = 1_000
OURS = "clip-batch"
MODES = ("defaults", "equal")
AT = f"at_{ask.TARGET}"

Line = dict[str, Any]
"""What was measured of one contender."""

AUTOFAISS = """
import json, sys
import faiss
from autofaiss import build_index
source, folder, *memory = sys.argv[1:]
more = dict(max_index_memory_usage=memory[0], current_memory_available=memory[1]) if memory else {}
index, infos = build_index(source, file_format="npy", save_on_disk=False, **more)
faiss.write_index(index, f"{folder}/image.index")
with open(f"{folder}/image.json", "w") as file:
    json.dump(infos, file, default=float)  # numpy 2's float32, over which autofaiss's own writing stumbles
"""

HNSW = """
import sys
from pathlib import Path
import faiss
import numpy as np
source, folder = sys.argv[1:]
index = None
for file in sorted(Path(source).glob("*.npy")):
    vectors = np.load(file).astype(np.float32)
    index = index or faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
faiss.write_index(index, f"{folder}/image.index")
"""


def fabricate(home: Path, rows: int, dim: int) -> None:
    """Write home/out, a committed OUT; by kind home/<kind>.npy, queries, and home/<kind>.truth.npy, rows to find."""
    most = max(ask.KS)
    queries = dict(zip(ask.KINDS, write_out(home / "out", rows, dim, PART_ROWS, QUERIES), strict=True))
    source = reader.open_embeddings(Store(str(home / "out")), load_plan(Store(str(home / "out"))))
    together = np.concatenate([*queries.values()])
    scores, ids = np.empty((len(together), 0), dtype=np.float32), np.empty((len(together), 0), dtype=np.int64)
    for start in range(0, rows, PART_ROWS):
        stop = min(start + PART_ROWS, rows)
        more, places = faiss_search.nearest(together, npy.unit(source.read_vectors("image", start, stop)), most)
        scores, ids = np.hstack([scores, more]), np.hstack([ids, places + start])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :most]
        scores, ids = np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)
    for kind, truth in zip(queries, np.split(ids, len(queries)), strict=True):
        np.save(home / f"{kind}.npy", queries[kind])
        np.save(home / f"{kind}.truth.npy", truth)


def commands(out: Path, mode: str, options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """The name and command of each contender that is installed; the folder to write into is to be appended."""
    limits = [f"{parse_bytes(text)}B" for text in (options.memory, options.build_memory)] if mode == "equal" else []

    def flags(*names: str) -> list[str]:
        return [word for pair in zip(names, limits, strict=False) for word in pair]

    yield "autofaiss", [sys.executable, "-c", AUTOFAISS, str(out / "img_emb"), "FOLDER", *limits]
    beside = ROOT / ".clip-retrieval/bin/python"
    if python := os.environ.get("CLIP_RETRIEVAL_PYTHON") or (str(beside) if beside.exists() else ""):
        yield (
            "clip-retrieval",
            [
                *(
                    python,
                    "-c",
                    "from clip_retrieval.cli import main; main()",
                    "index",
                    "--embeddings_folder",
                    str(out),
                ),
                *("--index_folder", "FOLDER", "--text_subfolder", "none"),
                *flags("--max_index_memory_usage", "--current_memory_available"),
            ],
        )
    yield (
        OURS,
        [
            *(sys.executable, "-m", "clip_batch", "merge", "--output", str(out), "--index", "FOLDER"),
            *("--modalities", "image", *flags("--index-memory", "--max-memory"), *shlex.split(options.ours)),
        ],
    )
    if mode == "defaults":
        yield "HNSW32", [sys.executable, "-c", HNSW, str(out / "img_emb"), "FOLDER"]


def contend(name: str, command: Sequence[str], home: Path, limit: float) -> Line:
    """Build the index of a contender, and ask it."""
    folder, environment = home / name, {}
    if (core := openblas_core(Path("/proc/cpuinfo").read_text())) and "OPENBLAS_CORETYPE" not in os.environ:
        environment["OPENBLAS_CORETYPE"] = core
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    log = home / f"{name}.log"
    words = [str(folder) if word == "FOLDER" else word for word in command]
    line = process.run(words, log, limit, environment)
    print(name, line, file=sys.stderr)
    if line["exit"]:
        print(log.read_text()[-2000:], file=sys.stderr)
        return line
    asked = [sys.executable, "-m", "tests.bench.ask", name, str(folder), str(home)]
    line |= _json(asked, environment)
    at = line[AT]["text_10"]
    line["serving"] = _json([*asked, str((at and at["effort"]) or 0)], environment)
    return line


def _json(command: Sequence[str], environment: Mapping[str, str]) -> Line:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **environment})
    found: Line = json.loads(done.stdout)
    return found


def median(values: Sequence[Any]) -> Any:
    """The median of numbers; of dicts that of each of their values, by name; else the first."""
    if all(isinstance(value, dict) for value in values):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: median([value[name] for value in values if name in value]) for name in names}
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return statistics.median(values)
    return values[0]


def summarize(runs: Sequence[dict[str, dict[str, Line]]]) -> dict[str, dict[str, Line]]:
    """By mode and contender: the medians over the runs in which it built its index; nothing where it never did."""
    summary: dict[str, dict[str, Line]] = {}
    for mode in runs[0]:
        for name in runs[0][mode]:
            built = [run[mode][name] for run in runs if not run[mode][name]["exit"]]
            summary.setdefault(mode, {})[name] = median(built) if built else {}
    return summary


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--memory", help="of the served index, for `equal`; default: 2GiB for 1,000,000 rows")
    parser.add_argument("--build-memory", help="of a build, for `equal`; default: twice the index, at least 1 GB")
    parser.add_argument("--limit", type=float, default=900, help="seconds of a build")
    parser.add_argument("--runs", type=int, default=1, help="how often all is built and asked")
    parser.add_argument("--only", nargs="*", help="names of contenders")
    parser.add_argument("--ours", default="", help="more options of clip-batch merge")
    parser.add_argument("--home", help="keep the data there, and use what is there")
    options = parser.parse_args()
    options.memory = options.memory or f"{2**31 * options.rows // 1_000_000}B"
    options.build_memory = options.build_memory or f"{max(10**9, 2 * parse_bytes(options.memory))}B"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what runs is ended too
    runs: list[dict[str, dict[str, Line]]] = []
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(options.home or temporary)
        if not (home / f"{ask.KINDS[-1]}.truth.npy").exists():
            started = time.monotonic()
            fabricate(home, options.rows, options.dim)
            print(f"data in {time.monotonic() - started:.0f} s", file=sys.stderr)
        for _ in range(options.runs):
            runs.append({})
            for mode in options.modes:
                runs[-1][mode] = {
                    name: contend(name, command, home, options.limit)
                    for name, command in commands(home / "out", mode, options)
                    if not options.only or name in options.only
                }
    summary = summarize(runs)
    result.report("compare", "index", options, _rows(options, summary), {"median": summary, "runs": runs})


def _rows(options: argparse.Namespace, summary: dict[str, dict[str, Line]]) -> list[result.Row]:
    """Ours beside each peer: all figures beside autofaiss, the most telling ones beside the others."""
    rows = []
    for mode, lines in summary.items():
        ours = lines.get(OURS)
        for peer, theirs in lines.items() if ours else ():
            if peer == OURS:
                continue
            assert ours is not None
            front, end = "" if mode == "defaults" else f"{mode}_", "" if peer == "autofaiss" else f"_{peer}"
            spent = {
                "seconds": round(1000 * ours["cpu_seconds"] / options.rows, 4),
                "query": _get(ours, AT, "text_10", "cpu_ms"),
                "image_query": _get(ours, AT, "image_10", "cpu_ms"),
                "served": _get(ours, "served", "text_10", "cpu_ms"),
            }
            for key, what, unit, mine, other in _figures(options, mode, ours, theirs, not end):
                ratio = None
                if unit and mine and isinstance(other, (int, float)):
                    ratio = round(mine / other if unit == "queries/s" else other / mine, 2)
                rows.append(
                    result.Row(f"{front}{key}{end}", what, unit, mine, other, peer, ratio, None, spent.get(key))
                )
    return rows


def _get(line: Line, *names: str) -> Any:
    """A figure by the names that lead to it; None where one of them is absent."""
    found: Any = line
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _figures(
    options: argparse.Namespace, mode: str, ours: Line, theirs: Line, all_of_them: bool
) -> Iterator[tuple[str, str, str, Any, Any]]:
    """The key, the text, the unit, ours and the peer's (None: it built nothing) of each figure."""

    def both(*names: str) -> tuple[Any, Any]:
        return _get(ours, *names), _get(theirs, *names)

    given = "defaults" if mode == "defaults" else f"{parse_bytes(options.memory) / 1e9:.2f} GB for the index"
    what = f"index of {options.rows:,} x {options.dim}, image vectors, {given}, {ours['key']}"
    mine, other = both("seconds")
    yield "seconds", f"{what} against {theirs.get('key', '?')}", "s", mine, other or f"over {options.limit:g}"
    yield "cpu", "CPU time of that build", "s", *both("cpu_seconds")
    yield "peak", "peak resident memory of that build", "MB", *both("peak_mb")
    yield "peak_anonymous", "the anonymous part of it, which is no file's", "MB", *both("peak_anonymous_mb")
    for k in ask.KS:
        yield f"recall_{k}", f"recall@{k} of captions as served", "", *both("served", f"text_{k}", "recall")
    yield "query", f"one caption at recall@10 .95, one thread ({given})", "ms", *both(AT, "text_10", "ms")
    yield "image_query", f"one image at recall@10 .95, one thread ({given})", "ms", *both(AT, "image_10", "ms")
    if not all_of_them:
        return
    for k in ask.KS:
        yield f"image_recall_{k}", f"recall@{k} of images as served", "", *both("served", f"image_{k}", "recall")
    yield "served", f"one caption as served, one thread ({given})", "ms", *both("served", "text_10", "ms")
    for clients in ask.CLIENTS:
        who, names = f"{clients} client{'s' * (clients > 1)}", ("serving", "asked", f"{AT}_{clients}")
        yield f"rate_{clients}", f"captions at recall@10 .95, {who}", "queries/s", *both(*names, "queries_s")
        yield f"p99_{clients}", f"99th percentile of these, {who}", "ms", *both(*names, "p99_ms")
    memory = "serving", "memory"
    yield "resident", f"resident memory of the process that served ({given})", "MB", *both(*memory, "resident_mb")
    yield "anonymous", "the anonymous part of it", "MB", *both(*memory, "anonymous_mb")


if __name__ == "__main__":
    main()
