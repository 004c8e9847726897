"""Measures searches with filters at a running service: an allow-list of values, a range, a licence, part of a text.

    python -m tests.bench.filters [--rows 10000000] [--allowed 100000] [--record]

The index is made of clip-retrieval's files: 8 dimensions, and a text that no other row has, a licence and a width.
Each filter is asked for the first time in several variants, of which the fastest counts, and then again, from the
service's cache. All is measured from the client: the request's JSON is read, and 10 hits are answered.
"""

from __future__ import annotations

import http.client
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_batch.config import MergeConfig
from clip_batch.index.merge.merge import merge
from tests.bench import result
from tests.servers.serving import running

FILES, VARIANTS, REPEATS = 10, 5, 10


def make(folder: Path, rows: int) -> str:
    """INDEX of `rows` rows, in `folder`."""
    rng, each = np.random.default_rng(0), rows // FILES
    for name in ("img_emb", "metadata"):
        (folder / "out" / name).mkdir(parents=True)
    for file in range(FILES):
        vectors = rng.standard_normal((each, 8), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        np.save(folder / f"out/img_emb/img_emb_{file}.npy", vectors.astype(np.float16))
        numbers = np.arange(file * each, (file + 1) * each)
        licenses = pa.array(["cc0", "by", "by-sa", "nc"]).take(pa.array(numbers % 4))
        columns = {"image_path": pa.array(numbers).cast(pa.string()), "license": licenses}
        table = pa.table({**columns, "width": pa.array((numbers % 4000).astype(np.int32))})
        pq.write_table(table, folder / f"out/metadata/metadata_{file}.parquet")
    config = MergeConfig(shard_rows=rows // 4, queries=5, index_key="IVF64,SQ8", made_by=["fake:8"])
    merge(str(folder / "out"), str(folder / "index"), config)
    return str(folder / "index")


def seconds(connection: http.client.HTTPConnection, filters: list[dict[str, Any]]) -> float:
    """Return how long a search with filters takes; it must find ten rows."""
    body = json.dumps({"id": 1, "k": 10, "filters": filters}).encode()
    began = time.perf_counter()
    connection.request("POST", "/v1/search", body)
    answer = connection.getresponse().read()
    taken = time.perf_counter() - began
    assert len(json.loads(answer)["hits"]) == 10, answer[:300]
    return taken


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--allowed", type=int, default=100_000)
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    filters: dict[str, Callable[[int], dict[str, Any]]] = {
        "allowed": lambda _: {
            "column": "image_path",
            "in": rng.choice(options.rows, options.allowed, replace=False).astype(str).tolist(),
        },
        "license": lambda number: {"column": "license", "in": ["by", str(number)]},
        "range": lambda number: {"column": "width", "min": number, "max": 2000},
        "contains": lambda number: {"column": "image_path", "contains": f"9{number}9"},
    }
    with tempfile.TemporaryDirectory() as home, running({"index": make(Path(home), options.rows)}) as url:
        connection = http.client.HTTPConnection(urlsplit(url).hostname or "", urlsplit(url).port)
        found = {"plain": min(seconds(connection, []) for _ in range(REPEATS))}
        for name, make_filter in filters.items():
            variants = [make_filter(number) for number in range(VARIANTS)]
            found[name] = min(seconds(connection, [variant]) for variant in variants)
            found[f"{name}_cached"] = min(seconds(connection, [variants[-1]]) for _ in range(REPEATS))
    found = {name: round(1000 * value, 1) for name, value in found.items()}
    print(found, file=sys.stderr)
    what = {
        "allowed": f"an allow-list of {options.allowed:,} texts",
        "license": "one of four licences",
        "range": "a range of numbers",
        "contains": "part of a text",
    }
    targets = {"allowed": 1000.0, "allowed_cached": 50.0}
    rows = [result.Row("plain", f"a search without filters of {options.rows:,} rows, by HTTP", "ms", found["plain"])]
    for name, text in what.items():
        for key, when in ((name, "for the first time"), (f"{name}_cached", "again")):
            target = targets.get(key)
            ratio = round(target / found[key], 2) if target else None
            rows.append(
                result.Row(key, f"a search with {text}, {when}", "ms", found[key], target, "", ratio, target and 1.0)
            )
    result.report("filters", "serve", options, rows, found)


if __name__ == "__main__":
    main()
