"""A real service in a process of its own, for the tests of the client and of the page."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from clip_batch.config import EmbedConfig, MergeConfig, PlanConfig, StorageConfig
from clip_batch.launch.local import run_worker
from clip_batch.plan import make_plan
from clip_batch.stages.merge import merge
from tests.processes import free_ports


def index_of(tars: Sequence[str], folder: Path) -> str:
    """INDEX of tars by the fake encoder of 8 dimensions, in two shards or more."""
    output, index = str(folder / "out"), str(folder / "index")
    make_plan(PlanConfig(input=list(tars), model="fake:8"), output, StorageConfig())
    run_worker(output, None, EmbedConfig(progress=False), StorageConfig())
    manifest = merge(output, index, MergeConfig(shard_rows=100, queries=5), StorageConfig())
    assert manifest.rows > 0
    return index


@contextlib.contextmanager
def running(indices: dict[str, str], *options: str, token: str = "") -> Iterator[str]:
    """The URL of `clip-batch serve` over named indices, which answers."""
    [port] = free_ports(1)
    named = [f"{name}={index}" for name, index in indices.items()]
    command = [sys.executable, "-m", "clip_batch", "serve", "--index", *named, "--port", str(port), *options]
    environment = {**os.environ, **({"CLIP_BATCH_TOKEN": token} if token else {})}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, "the service ended"
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{url}/readyz", timeout=5):
                break
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=30)
