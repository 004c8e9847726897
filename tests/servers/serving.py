"""Indices for tests, made of tars of JPEGs with the fake encoder, and servers of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from clip_batch.config import EmbedConfig, MergeConfig, PlanConfig, ServeConfig, StorageConfig
from clip_batch.index.merge.merge import merge
from clip_batch.launch.local import run_worker
from clip_batch.plan.plan import make_plan
from clip_batch.serve.search.app import create_app
from tests.corpus import good_tar
from tests.servers.processes import free_ports

MODEL = "fake:8"
ROWS = 60


def make_index(folder: Path, rows: int = ROWS, seed: int = 0, model: str = MODEL, key: str = "auto") -> str:
    """INDEX of two tars of `rows` samples in all, in two index shards; every fifth has no caption."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = [i % 5 != 4 for i in range(rows // 2)]
    tars = [good_tar(str(folder / f"{i}.tar"), rows // 2, seed + i, captions=captions) for i in range(2)]
    return index_of(tars, folder, model, MergeConfig(shard_rows=rows // 2 + 1, queries=5, index_key=key))


def index_of(
    tars: list[str], folder: Path, model: str = MODEL, config: MergeConfig = MergeConfig(shard_rows=100, queries=5)
) -> str:
    """INDEX of tars, in `folder`."""
    output, index = str(folder / "out"), str(folder / "index")
    make_plan(tars, output, PlanConfig(model=model), storage=StorageConfig())
    done = run_worker(output, None, EmbedConfig(progress=False), StorageConfig())
    assert all(outcome.state == "committed" for outcome in done)
    merge(output, index, config, storage=StorageConfig())
    return index


@contextlib.contextmanager
def served(index: str, storage: StorageConfig = StorageConfig(), **options: Any) -> Iterator[TestClient]:
    """A client of an app over an index, within its own event loop."""
    app = create_app({"index": index}, ServeConfig(**options), storage)
    with TestClient(app, base_url="http://localhost:1234", raise_server_exceptions=True) as client:
        yield client


@contextlib.contextmanager
def running(indices: dict[str, str], *options: str, token: str = "", ready: str = "/readyz") -> Iterator[str]:
    """The URL of a running `clip-batch serve` of named indices, once it answers `ready` with 200."""
    [port] = free_ports(1)
    named = [f"{name}={index}" for name, index in indices.items()]
    command = [sys.executable, "-m", "clip_batch", "serve", "--index", *named, "--port", str(port), *options]
    environment = {**os.environ, **({"CLIP_BATCH_TOKEN": token} if token else {})}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, "the service ended"
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{url}{ready}", timeout=5):
                break
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=30)
