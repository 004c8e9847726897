"""`clip-batch demo`: plan, embed, merge, search and serve on the embedded data; prints the command of each step."""

from __future__ import annotations

import os
import time
from shlex import quote

from clip_batch.config import EmbedConfig, MergeConfig, PlanConfig, ServeConfig, StorageConfig
from clip_batch.demo import data
from clip_batch.index.merge.merge import merge
from clip_batch.launch.local import run_worker
from clip_batch.plan.plan import make_plan
from clip_batch.search.results import describe_hits
from clip_batch.search.searcher import Searcher

QUERIES = ("red apple", "a cat laughing", "flag of Brazil", "火车", "下雨的云")
"""Texts that the demo searches for."""

PICTURE = "1f431"
"""The key of the picture that it searches with: a cat's face."""


def run(folder: str, serve: bool, config: ServeConfig) -> int:
    """Write tars, plan, embed, merge and search in `folder`, then serve; returns the exit code.

    What exists from an earlier run is not done again.
    """
    if serve:
        from clip_batch.serve.http.port import check_port

        check_port(config)
    tars, output, index = (os.path.join(folder, name) for name in ("tars", "embeddings", "index"))
    storage = StorageConfig()

    _step("tars", f"1,911 captioned pictures in {tars}")
    if not os.path.isdir(tars):
        data.write_tars(tars)

    _step(
        "plan", f"clip-batch plan --input {quote(tars)} --model demo --partition-samples 400 --output {quote(output)}"
    )
    make_plan([tars], output, PlanConfig(model="demo", partition_samples=400), storage=storage)

    _step("embed", f"clip-batch embed --output {quote(output)}")
    outcomes = run_worker(output, None, EmbedConfig(), storage)
    if any(outcome.state == "failed" for outcome in outcomes):
        print(f"some partitions failed: clip-batch status --output {quote(output)}")
        return 1

    _step("merge", f"clip-batch merge --output {quote(output)} --index {quote(index)} --shard-rows 500")
    manifest = merge(output, index, MergeConfig(shard_rows=500), storage=storage)
    print(f"{manifest.rows:,} rows in {len(manifest.shards)} index shards")

    with Searcher(index, storage) as searcher:
        _search(searcher, index, folder)

    print(f"\nGo on: clip-batch verify --output {quote(output)} --deep\n       clip-batch serve --index {quote(index)}")
    if serve:
        from clip_batch.serve.search.app import run as run_server

        run_server([index], config, storage)
    return 0


def _search(searcher: Searcher, index: str, folder: str) -> None:
    """Print the hits of each text, and of one picture, which is written to `folder`."""
    searcher.encode_text(["warm up"])
    for query in QUERIES:
        _step("search", f"clip-batch search --index {quote(index)} --text {quote(query)}")
        started = time.perf_counter()
        hits = searcher.search(searcher.encode_text([query]), 5)[0]
        milliseconds = 1000 * (time.perf_counter() - started)
        print(f"{describe_hits(hits)}\n{milliseconds:.0f} ms")
    picture = next(row for row in data.load().to_pylist() if row["key"] == PICTURE)
    path = os.path.join(folder, "query.jpg")
    with open(path, "wb") as file:
        file.write(picture["image"])
    _step("search", f"clip-batch search --index {quote(index)} --image {quote(path)}    ({picture['name_en']})")
    print(describe_hits(searcher.search(searcher.encode_image(picture["image"]), 5)[0]))


def _step(name: str, text: str) -> None:
    """Print the heading of a step."""
    print(f"\n== {name}: {text}", flush=True)
