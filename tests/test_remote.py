"""The whole line with input, OUT and INDEX on a real S3 server, as separate processes see it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import corpus

pytestmark = pytest.mark.slow

PRINT = """
import sys, s3fs
store = s3fs.S3FileSystem(endpoint_url=sys.argv[1])
print([store.cat(path) for path in store.find("bucket/out")])
"""

UPLOAD = """
import sys, s3fs
store = s3fs.S3FileSystem(endpoint_url=sys.argv[1])
store.mkdir("bucket")
store.put(sys.argv[2], "bucket/tars", recursive=True)
"""


@pytest.fixture
def environ(tmp_path: Path) -> Iterator[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        endpoint = f"http://127.0.0.1:{port}"
        environ = {**os.environ, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "topsecret"}
        environ["AWS_DEFAULT_REGION"] = "us-east-1"
        environ["CLIP_BATCH_STORAGE_OPTIONS"] = json.dumps(
            {"endpoint_url": endpoint, "key": "key", "secret": "topsecret"}
        )
        environ["XDG_CACHE_HOME"] = str(tmp_path / "cache")
        (tmp_path / "tars").mkdir()
        for number in range(4):
            corpus.good_tar(str(tmp_path / "tars" / f"{number:05d}.tar"), 25, seed=number)
        subprocess.run([sys.executable, "-c", UPLOAD, endpoint, str(tmp_path / "tars")], env=environ, check=True)
        yield environ
    finally:
        server.kill()
        server.wait()


def test_everything_on_s3(environ: dict[str, str]) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "clip_batch", *arguments]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out, index = "s3://bucket/out", "s3://bucket/index"
    run("plan", "--input", "s3://bucket/tars/*.tar", "--model", "fake:16", "--partition-samples", "20", "--output", out)
    with ThreadPoolExecutor(3) as pool:
        racing = list(
            pool.map(lambda _: json.loads(run("worker", "--output", out, "--partitions", "0", "--json")), range(3))
        )
    states = [outcome["state"] for outcomes in racing for outcome in outcomes]
    assert states.count("committed") == 1
    assert set(states) <= {"committed", "lost"}
    run("embed", "--output", out)
    assert json.loads(run("verify", "--output", out, "--deep", "--json"))["rows"] == 100
    assert json.loads(run("gc", "--output", out, "--json")) == []
    run("merge", "--output", out, "--index", index, "--shard-rows", "40")
    assert json.loads(run("verify", "--index", index, "--deep", "--json"))["ok"]
    hits = json.loads(run("search", "--index", index, "--text", "caption 7 of tar 2", "--modality", "text", "--json"))
    assert hits[0]["metadata"]["key"] == "002000007"
    assert "ok   put-if-absent" in run("doctor", "--output", out)
    endpoint = json.loads(environ["CLIP_BATCH_STORAGE_OPTIONS"])["endpoint_url"]
    stored = subprocess.run([sys.executable, "-c", PRINT, endpoint], env=environ, capture_output=True, text=True)
    assert "plan_parquet" in stored.stdout
    assert "topsecret" not in stored.stdout, "credentials are written nowhere"
