"""Indexes the same vectors by autofaiss alone, by clip-retrieval's `index` and by clip-batch's merge, and compares.

    python -m tests.bench.compare [--rows 200000] [--memory 410MiB] [--limit 480] [--ours '--rerank 3'] [--record]

Each contender builds in a process of its own, one after another, image vectors only, with the same memory for the
served index and its own defaults otherwise. Figures of each are the seconds of the build; its CPU seconds, which say
more on a machine that others use; its peak resident memory, and the anonymous part of it (file pages left out); the
size of the index; recall@10 against exact search and milliseconds for each query (one by one, one thread), as it would
be served and over a sweep of its search effort. A build that takes over `--limit` seconds is ended, and reported so.

clip-retrieval runs with the interpreter that CLIP_RETRIEVAL_PYTHON names, else with .clip-retrieval/bin/python, and is
left out where there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_batch.config import parse_bytes
from clip_batch.embeddings import reader
from clip_batch.index.ann import faiss_search
from clip_batch.plan.plan import load_plan
from clip_batch.storage import npy
from clip_batch.storage.store import Store
from tests import ROOT
from tests.bench import result
from tests.bench.realistic import realistic
from tests.fabricated import commit, make_plan

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Search = Callable[[Vectors, int], Ids]

PART_ROWS = 50_000
QUERIES = 2_000
TIMED = 300
"""Queries that run one by one, in each of ROUNDS rounds, of which the best counts."""
ROUNDS = 3
K = 10
TARGET = 0.95


def fabricate(home: Path, rows: int, dim: int) -> None:
    """Write home/out, a committed OUT; home/queries.npy, captions of other images; home/truth.npy, the rows to find."""

    parts = -(-rows // PART_ROWS)
    plan = make_plan(home / "out", parts)
    made = realistic(rows, dim, PART_ROWS, QUERIES)
    for partition in range(parts):
        commit(home / "out", plan, partition, *next(made))
    queries = next(made)[1]
    source = reader.open_embeddings(Store(str(home / "out")), plan)
    scores, ids = np.empty((len(queries), 0), dtype=np.float32), np.empty((len(queries), 0), dtype=np.int64)
    for start in range(0, rows, PART_ROWS):
        stop = min(start + PART_ROWS, rows)
        more, places = faiss_search.nearest(queries, npy.unit(source.read_vectors("image", start, stop)), K)
        scores, ids = np.hstack([scores, more]), np.hstack([ids, places + start])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :K]
        scores, ids = np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)
    np.save(home / "queries.npy", queries)
    np.save(home / "truth.npy", ids)


def build(command: list[str], log: Path, limit: float, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a contender; returns its seconds, exit code, peak memory (MB, all processes), and whether it was ended."""
    started, before = time.monotonic(), _cpu_of_children()
    peak = {"VmHWM": 0, "RssAnon": 0}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env={**os.environ, **(environment or {})}
        )
        try:
            while process.poll() is None and time.monotonic() - started < limit:
                for name, value in _memory(process.pid).items():
                    peak[name] = max(peak[name], value)
                time.sleep(0.05)
            seconds, over = time.monotonic() - started, process.poll() is None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(_cpu_of_children() - before, 1),
        "over_limit": over,
        "exit": code,
        "peak_mb": peak["VmHWM"] // 1024,
        "peak_anonymous_mb": peak["RssAnon"] // 1024,
    }


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _memory(pid: int) -> dict[str, int]:
    """VmHWM and RssAnon in kB, summed over a process and those that it started."""
    total = {"VmHWM": 0, "RssAnon": 0}
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        for name in total:
            if found := re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE):
                total[name] += int(found[1])
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                for name, value in _memory(int(child)).items():
                    total[name] += value
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended meanwhile
    return total


AUTOFAISS = """
import sys
from autofaiss import build_index
source, folder, memory, available = sys.argv[1:]
build_index(source, index_path=f"{folder}/image.index", index_infos_path=f"{folder}/image.json", file_format="npy",
            max_index_memory_usage=memory, current_memory_available=available)
"""


def commands(home: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each contender that is installed; each writes into home/<its name>."""
    memory, available = str(parse_bytes(options.memory)) + "B", str(parse_bytes(options.build_memory)) + "B"
    out, found = str(home / "out"), {}
    found["autofaiss"] = [sys.executable, "-c", AUTOFAISS, f"{out}/img_emb", str(home / "autofaiss"), memory, available]
    beside = ROOT / ".clip-retrieval/bin/python"
    python = os.environ.get("CLIP_RETRIEVAL_PYTHON") or (str(beside) if beside.exists() else "")
    if python:
        found["clip-retrieval"] = [
            *(python, "-c", "from clip_retrieval.cli import main; main()", "index"),
            *("--embeddings_folder", out, "--index_folder", str(home / "clip-retrieval")),
            *("--text_subfolder", "none", "--max_index_memory_usage", memory, "--current_memory_available", available),
        ]
    found["clip-batch"] = [
        *(sys.executable, "-m", "clip_batch", "merge", "--output", out, "--index", str(home / "clip-batch")),
        *("--modalities", "image", "--index-memory", options.memory, "--max-memory", options.build_memory),
        *shlex.split(options.ours),
    ]
    return found


def evaluate(name: str, home: Path) -> dict[str, Any]:
    """Recall@10 and milliseconds for each query of a built index, as served and at other efforts, on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before anything counts the cores
    queries, truth = np.load(home / "queries.npy"), np.load(home / "truth.npy")
    search, served, efforts, facts = (_ours if name == "clip-batch" else _theirs)(home / name, home)

    def measure(effort: int) -> dict[str, Any]:
        found = search(queries, effort)
        recall = np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]) / K
        rounds = []
        for _ in range(ROUNDS):
            started = time.perf_counter(), time.process_time()
            for query in queries[:TIMED]:
                search(query[None], effort)
            rounds.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        ms, cpu_ms = (round(min(times) / TIMED * 1000, 3) for times in zip(*rounds, strict=True))
        return {"effort": effort, "recall": round(float(recall), 4), "ms": ms, "cpu_ms": cpu_ms}

    curve = []
    for effort in efforts:
        curve.append(measure(effort))
        flat = len(curve) > 3 and curve[-1]["recall"] == curve[-2]["recall"]
        if flat or curve[-1]["recall"] > 0.99 or curve[-1]["cpu_ms"] > 50:
            break
    return {
        **facts,
        "served": measure(served),
        f"at_{TARGET}": next((point for point in curve if point["recall"] >= TARGET), None),
        "curve": curve,
    }


def _theirs(folder: Path, home: Path) -> tuple[Search, int, list[int], dict[str, Any]]:
    """Open a faiss file with the parameters that autofaiss tuned; its rows are those of the npy files, by name."""
    import faiss

    index = faiss.read_index(str(folder / "image.index"))
    infos = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    facts = {"key": infos[0]["index_key"], "parameters": infos[0]["index_param"]} if infos else {}
    parameters = faiss.ParameterSpace()
    ivf = faiss.try_extract_index_ivf(index)
    served = ivf.nprobe if ivf is not None else index.hnsw.efSearch
    if ivf is not None:
        ivf = faiss.downcast_index(ivf)

    current = served  # until another is asked for, the file's own parameters stand

    def search(queries: Vectors, effort: int) -> Ids:
        nonlocal current
        if effort != current:
            wanted = f"nprobe={effort}" if ivf is not None else f"efSearch={effort}"
            if ivf is not None and hasattr(faiss.downcast_index(ivf.quantizer), "hnsw"):
                wanted += f",quantizer_efSearch={max(2 * effort, 16)}"
            parameters.set_index_parameters(index, wanted)
            current = effort
        ids: Ids = index.search(queries, K)[1]
        return ids

    most = ivf.nlist if ivf is not None else 2**14
    size = (folder / "image.index").stat().st_size
    efforts = [2**i for i in range(0 if ivf is not None else 4, 15) if 2**i <= most]
    return search, served, efforts, {**facts, "index_mb": size >> 20}


def _ours(folder: Path, home: Path) -> tuple[Search, int, list[int], dict[str, Any]]:
    """Open the live version by Searcher; the lineage in its metadata turns ids into rows of OUT."""
    from clip_batch.search.searcher import Searcher

    searcher = Searcher(str(folder))
    out = Store(str(home / "out"))
    source = reader.open_embeddings(out, load_plan(out))
    starts = {part.partition: start for part, start in zip(source.commits, source.starts, strict=False)}
    lineage = searcher.metadata(np.arange(source.rows), ["partition", "row"])
    rows = np.array([starts[row["partition"]] + row["row"] for row in lineage], dtype=np.int64)
    size = sum(path.stat().st_size for path in (folder / searcher.manifest.version / "image").glob("*.index"))
    manifest = searcher.manifest
    facts = {"key": manifest.key["image"], "rerank": manifest.rerank, "shards": len(manifest.shards)}
    facts["promised"] = manifest.recall["image"]
    served = manifest.effort["image"] or 0

    def search(queries: Vectors, effort: int) -> Ids:
        return rows[searcher.search_ids(queries, K, "image", effort or None)[1]]

    return search, served, [2**i for i in range(13)] if served else [0], {**facts, "index_mb": size >> 20}


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--memory", help="of the served index, for all; default: 2GiB for 1,000,000 rows")
    parser.add_argument("--build-memory", help="that a build may take, for all; default: twice that of the index")
    parser.add_argument("--limit", type=float, default=480, help="seconds of a build")
    parser.add_argument("--only", nargs="*", help="names of contenders")
    parser.add_argument("--ours", default="", help="more options of clip-batch merge")
    parser.add_argument("--home", help="keep the data there, and use what is there")
    parser.add_argument("--evaluate", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.memory = options.memory or f"{2**31 * options.rows // 1_000_000}B"
    options.build_memory = options.build_memory or f"{2 * parse_bytes(options.memory)}B"
    if options.evaluate:
        print(json.dumps(evaluate(options.evaluate, Path(options.home))))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what runs is ended too
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(options.home or temporary)
        if not (home / "truth.npy").exists():
            started = time.monotonic()
            fabricate(home, options.rows, options.dim)
            print(f"data in {time.monotonic() - started:.0f} s", file=sys.stderr)
        lines = {}
        for name, command in commands(home, options).items():
            if options.only and name not in options.only:
                continue
            (home / name).mkdir(exist_ok=True)
            lines[name] = build(command, home / f"{name}.log", options.limit)
            print(name, lines[name], file=sys.stderr)
            if lines[name]["exit"] == 0:
                ask = [sys.executable, "-m", "tests.bench.compare", "--home", str(home), "--evaluate", name]
                lines[name] |= json.loads(subprocess.run(ask, check=True, stdout=subprocess.PIPE).stdout)
            else:
                print((home / f"{name}.log").read_text()[-2000:], file=sys.stderr)
        result.report("compare", "index", options, _rows(options, lines), {"contenders": lines})


def _rows(options: argparse.Namespace, lines: dict[str, dict[str, Any]]) -> list[result.Row]:
    """Ours beside each peer that built its index; nothing where ours or all of them failed."""
    built = {name: line for name, line in lines.items() if line["exit"] == 0}
    ours = built.pop("clip-batch", None)
    rows = []
    for peer, theirs in built.items() if ours else ():
        assert ours is not None
        size = (
            f"index of {options.rows:,} x {options.dim}, image vectors, {ours['key']} against {theirs.get('key', '?')}"
        )
        peaks = f"peak {ours['peak_mb']:,} against {theirs['peak_mb']:,} MB"
        cpu_ms = round(1000 * ours["cpu_seconds"] / options.rows, 4)
        for key, what, unit, mine, other in (
            ("seconds", f"{size}, built ({peaks})", "s", ours["seconds"], theirs["seconds"]),
            ("cpu", "CPU time of that build", "s", ours["cpu_seconds"], theirs["cpu_seconds"]),
            ("query", "one search of it as served, one thread", "ms", ours["served"]["ms"], theirs["served"]["ms"]),
            ("recall", "recall@10 of it as served", "", ours["served"]["recall"], theirs["served"]["recall"]),
        ):
            ratio = round(other / mine, 2) if unit else None
            spent = cpu_ms if key == "seconds" else None
            end = "" if peer == "autofaiss" else f"_{peer}"
            rows.append(result.Row(f"{key}{end}", what, unit, mine, other, peer, ratio, None, spent))
    return rows


if __name__ == "__main__":
    main()
