"""Reading and splitting tars of 256 px JPEGs: local files against S3 and HDFS on loopback, in one run; as JSON.

    python tests/bench/remote.py [--tars 6] [--samples 2000] [--rounds 3] [--hdfs]

`raw` is the store alone: the same ranged reads, the bytes thrown away. It bounds what any reader can
do, and on loopback it is the server (moto is Python, HDFS's DataNode Java) on the same cores. `split`
reads every sample; `decode` also decodes each image on one thread, which is nearer to what embed does.
`share` is the remote rate over the local one. Best of the rounds, interleaved. `scan` is what planning reads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clip_batch.decode import open_image
from clip_batch.inputs import expand_inputs
from clip_batch.read import read_slice
from clip_batch.read.ahead import Ahead
from clip_batch.read.scan import scan_tar
from clip_batch.store import Store, is_local
from clip_batch.transfer import THREADS, pieces, read_range, source
from clip_batch.types import Sample, Shard, Slice
from tests import corpus


def write(folder: str, tars: int, samples: int) -> None:
    images = [corpus.jpeg(seed, 256) + os.urandom(8_000) for seed in range(50)]  # padded to a photograph's 12 kB
    for number in range(tars):
        files = []
        for sample in range(samples):
            key = f"{number:03d}{sample:06d}"
            files += [(f"{key}.jpg", images[sample % 50]), (f"{key}.txt", b"a caption"), (f"{key}.json", b"{}")]
        corpus.write_tar(f"{folder}/{number:05d}.tar", files)


def split(shards: list[Shard], options: dict[str, Any], work: Callable[[Sample], object]) -> int:
    slices, plan, total = [Slice(shard) for shard in shards], corpus.plan_of(), 0
    with Ahead(slices, options, 10**9) as files:
        for piece in slices:
            for item in read_slice(piece, plan, options, files):
                assert isinstance(item, Sample)
                work(item)
                total += 1
    return total


def raw(shards: list[Shard], options: dict[str, Any]) -> int:
    """Bytes a pool of readers is given, kept by no one."""
    with ThreadPoolExecutor(THREADS) as pool:
        wanted = [(source(shard.url, options), *piece) for shard in shards for piece in pieces(0, shard.size or 0)]
        return sum(pool.map(lambda one: len(read_range(*one)), wanted))


def touch(sample: Sample) -> int:
    return zlib.adler32(sample.image or b"")


def decode(sample: Sample) -> object:
    return open_image(sample.image or b"", 10**8).convert("RGB").resize((224, 224))


@contextlib.contextmanager
def moto() -> Iterator[tuple[str, dict[str, Any]]]:
    """A new bucket on a server of its own, with the options that open it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        options = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "k", "secret": "s"}
        os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
        for _ in range(300):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        source("s3://bucket/x", options).fs.mkdir("bucket")
        yield "s3://bucket/tars", options
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def hadoop() -> Iterator[tuple[str, dict[str, Any]]]:
    from tests.hdfs_cluster import cluster, fetch_jars

    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder), fetch_jars()) as running:
        yield f"{running.url}/tars", {"dfs.replication": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tars", type=int, default=6)
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hdfs", action="store_true", help="HDFS too (needs Java: make services)")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        write(home, arguments.tars, arguments.samples)
        places: dict[str, tuple[str, dict[str, Any]]] = {"local": (home, {}), "s3": stack.enter_context(moto())}
        if arguments.hdfs:
            places["hdfs"] = stack.enter_context(hadoop())
        shards: dict[str, list[Shard]] = {}
        for name, (url, options) in places.items():
            for path in sorted(Path(home).glob("*.tar")) if not is_local(url) else ():
                Store(url, options).replace(path.name, path.read_bytes())
            shards[name] = expand_inputs([f"{url}/*.tar"], "tar", options)
        best: dict[str, dict[str, float]] = {name: {} for name in places}
        size = sum(shard.size or 0 for shard in shards["local"])

        def keep(name: str, what: str, amount: float, started: float) -> None:
            best[name][what] = max(best[name].get(what, 0.0), amount / (time.perf_counter() - started))

        for _ in range(arguments.rounds):
            for name, (_, options) in places.items():
                for what, work in (("split", touch), ("decode", decode)):
                    part = shards[name] if what == "split" else shards[name][:2]
                    started = time.perf_counter()
                    keep(name, what, split(part, options, work), started)
                if name != "local":
                    started = time.perf_counter()
                    assert raw(shards[name], options) == size
                    keep(name, "raw_mb", size / 1e6, started)
                started = time.perf_counter()
                scan_tar(shards[name][0], options)
                keep(name, "scan_mb", (shards[name][0].size or 0) / 1e6, started)
        per_sample = size / 1e6 / (arguments.tars * arguments.samples)
        for name, found in best.items():
            found["split_mb"] = found["split"] * per_sample
            if name != "local":
                found |= {f"{what}_share": found[what] / best["local"][what] for what in ("split", "decode")}
                found["split_share_of_raw"] = found["split_mb"] / found["raw_mb"]
    rounded = {name: {what: round(rate, 2) for what, rate in found.items()} for name, found in best.items()}
    print(json.dumps({"benchmark": "remote", "megabytes": round(size / 1e6), **rounded}))


if __name__ == "__main__":
    main()
