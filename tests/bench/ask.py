"""Opens an index that a contender of `compare` built, and asks it: recall, milliseconds, queries a second, memory.

    python -m tests.bench.ask NAME FOLDER HOME [EFFORT]

Without an effort: recall@10 and @100 and the milliseconds of queries one by one, on one thread. With one (0: none):
what a process that serves the index does, on all cores. It prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.bench.process import memory

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

KINDS = ("image", "text")
"""The kinds of queries: held-out images and their captions."""

KS = (10, 100)
TARGET = 0.95
TIMED = 200
"""Queries that are asked one by one, in each of ROUNDS rounds, of which the best counts."""
ROUNDS = 3
SLOW = 100.0
"""Milliseconds a query at which no more effort is tried."""
BISECTIONS = 3
"""How often the last doubling of the effort is halved, to find the least that reaches TARGET."""
CLIENTS = (1, 8)
SECONDS = 3.0
"""How long the clients ask, in each measurement of a serving process."""


@dataclass(frozen=True)
class Opened:
    """An index that is open for search.

    `search(queries (q, d), k, kind, effort)` returns the rows (q, k) of OUT; the effort None is the one it is served
    with, and `most` the largest (0: there is nothing to tune). `enter` is called by each client's thread, with the
    number of clients. `facts` are for the report.
    """

    search: Callable[[Vectors, int, str, int | None], Ids]
    most: int
    enter: Callable[[int], None]
    facts: dict[str, Any]


def open_ours(folder: Path, home: Path | None) -> Opened:
    """Open the live version by Searcher. With `home`, its metadata turns ids into rows of home/out."""
    from clip_batch.search.searcher import Searcher

    searcher = Searcher(str(folder))
    manifest, rows = searcher.manifest, None
    if home:
        table = searcher.table(np.arange(manifest.rows), ["partition", "row"])
        partition, row = (np.asarray(table[name], dtype=np.int64) for name in ("partition", "row"))
        rows = np.cumsum([0, *np.bincount(partition)])[partition] + row

    def search(queries: Vectors, k: int, kind: str, effort: int | None) -> Ids:
        ids = searcher.search_ids(queries, k, "image", effort, kind=kind)[1]
        return ids if rows is None else np.where(ids < 0, -1, rows[ids])

    files = [path for path in (folder / manifest.version).rglob("*") if path.parent.name == "image"]

    def mb(suffix: str) -> int:
        return sum(path.stat().st_size for path in files if path.suffix == suffix) >> 20

    facts = {
        "key": manifest.key["image"],
        "rerank": manifest.rerank,
        "shards": len(manifest.shards),
        "effort": manifest.effort["image"],
        "efforts": manifest.efforts.get("image"),
        "promised": manifest.recall["image"],
        "index_mb": mb(".index"),
        "rerank_mb": mb(".npy"),
    }
    return Opened(search, 2**13 if manifest.effort["image"] else 0, lambda clients: None, facts)


def open_theirs(folder: Path, home: Path | None) -> Opened:
    """Open a faiss file with the parameters that it was saved with; its rows are those of the npy files, by name."""
    import faiss

    index = faiss.read_index(str(folder / "image.index"))
    infos = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    parameters = faiss.ParameterSpace()
    ivf = faiss.try_extract_index_ivf(index)
    current: int | None = None

    def search(queries: Vectors, k: int, kind: str, effort: int | None) -> Ids:
        nonlocal current
        if effort != current:
            assert effort is not None, "the effort that it is served with comes first"
            words = [f"efSearch={effort}"]
            if ivf is not None:
                words = [f"nprobe={effort}"]
                if hasattr(faiss.downcast_index(ivf.quantizer), "hnsw"):
                    words.append(f"quantizer_efSearch={max(2 * effort, 16)}")
            parameters.set_index_parameters(index, ",".join(words))
            current = effort
        ids: Ids = index.search(queries, k)[1]
        return ids

    def enter(clients: int) -> None:
        if clients > 1:  # threads within each query would only be in each other's way
            faiss.omp_set_num_threads(1)

    facts = {
        "key": infos[0]["index_key"] if infos else "HNSW32",
        "effort": infos[0]["index_param"] if infos else f"efSearch={index.hnsw.efSearch}",
        "index_mb": (folder / "image.index").stat().st_size >> 20,
    }
    return Opened(search, ivf.nlist if ivf is not None else 2**13, enter, facts)


def measure(opened: Opened, home: Path) -> dict[str, Any]:
    """By kind of query and k: recall and milliseconds as served, and at the least effort that reaches TARGET."""
    asked = {kind: (np.load(home / f"{kind}.npy"), np.load(home / f"{kind}.truth.npy")) for kind in KINDS}
    cases = [(f"{kind}_{k}", kind, k, *asked[kind]) for kind in KINDS for k in KS]
    served = {
        case: {"recall": _recall(opened, queries, truth, k, kind, None), **_times(opened, queries, k, kind, None)}
        for case, kind, k, queries, truth in cases
    }
    at: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for case, kind, k, queries, truth in cases:
        curve = dict(_curve(opened, partial(_recall, opened, queries, truth, k, kind)))
        curves[case], at[case] = sorted(curve.items()), None
        if good := [effort for effort, recall in curve.items() if recall >= TARGET]:
            effort = min(good)
            at[case] = {"effort": effort, "recall": curve[effort], **_times(opened, queries, k, kind, effort)}
        elif not opened.most and served[case]["recall"] >= TARGET:
            at[case] = {"effort": None, **served[case]}
    return {**opened.facts, "served": served, f"at_{TARGET}": at, "curves": curves}


def _curve(opened: Opened, recall: Callable[[int], float]) -> Iterator[tuple[int, float]]:
    """Efforts and their recalls: doubled until TARGET is reached, then bisected."""
    effort, low, reached = 1, 0, False
    while effort <= opened.most:
        started = time.perf_counter()
        found = recall(effort)
        yield effort, found
        reached = found >= TARGET
        if reached or time.perf_counter() - started > SLOW:
            break
        low, effort = effort, 2 * effort
    for _ in range(BISECTIONS if reached else 0):
        middle = (low + effort) // 2
        if middle in (low, effort):
            break
        found = recall(middle)
        yield middle, found
        low, effort = (low, middle) if found >= TARGET else (middle, effort)


def _recall(opened: Opened, queries: Vectors, truth: Ids, k: int, kind: str, effort: int | None) -> float:
    """The share of the true k best rows among the k that are found."""
    hits = opened.search(queries, k, kind, effort)
    found = [len(np.intersect1d(one, two)) for one, two in zip(hits, truth[:, :k], strict=True)]
    return round(float(np.mean(found)) / k, 4)


def _times(opened: Opened, queries: Vectors, k: int, kind: str, effort: int | None) -> dict[str, float]:
    """Milliseconds and CPU milliseconds of a query that is asked alone, each of the best round."""
    rounds, asked = [], queries[:TIMED]
    for _ in range(ROUNDS):
        started = time.perf_counter(), time.process_time()
        for query in asked:
            opened.search(query[None], k, kind, effort)
        rounds.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    ms, cpu_ms = (round(1000 * min(times) / len(asked), 3) for times in zip(*rounds, strict=True))
    return {"ms": ms, "cpu_ms": cpu_ms}


def serve(opened: Opened, home: Path, effort: int | None) -> dict[str, Any]:
    """What clients see that ask captions, k = 10: as served, and at an effort; then the memory of the process in MB."""
    queries = np.load(home / "text.npy")
    asked = {f"served_{clients}": _clients(opened, queries, None, clients) for clients in CLIENTS}
    for clients in CLIENTS:
        if effort:
            asked[f"at_{TARGET}_{clients}"] = _clients(opened, queries, effort, clients)
        elif not opened.most:
            asked[f"at_{TARGET}_{clients}"] = asked[f"served_{clients}"]
    names = {"VmRSS": "resident_mb", "RssAnon": "anonymous_mb"}
    found = memory("self", list(names))
    return {"asked": asked, "memory": {names[name]: value // 1024 for name, value in found.items()}}


def _clients(opened: Opened, queries: Vectors, effort: int | None, clients: int) -> dict[str, float]:
    """Queries a second, and the median and 99th percentile of milliseconds, of clients that ask without a pause."""
    times: list[list[float]] = [[] for _ in range(clients)]
    together = threading.Barrier(clients + 1)
    opened.search(queries[:1], KS[0], "text", effort)  # sets the effort once, before the threads begin

    def client(number: int) -> None:
        opened.enter(clients)
        place = number * len(queries) // clients
        together.wait()
        end = time.perf_counter() + SECONDS
        while (started := time.perf_counter()) < end:
            opened.search(queries[place % len(queries)][None], KS[0], "text", effort)
            times[number].append(time.perf_counter() - started)
            place += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    together.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - started
    every = 1000 * np.concatenate(times)
    p50, p99 = np.percentile(every, [50, 99])
    return {"queries_s": round(len(every) / took, 1), "p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3)}


def main() -> None:
    name, folder, home, *effort = sys.argv[1:]
    if not effort:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before anything counts the cores
    opened = (open_ours if name == "clip-batch" else open_theirs)(Path(folder), None if effort else Path(home))
    found = serve(opened, Path(home), int(effort[0]) or None) if effort else measure(opened, Path(home))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
