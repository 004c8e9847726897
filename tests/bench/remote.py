"""Measures reading tars of 256 px JPEGs from S3, GCS and HDFS on this machine, beside local files, in one run.

    python -m tests.bench.remote [--tars 6] [--samples 2000] [--repeats 3] [--rounds 5] [--moto] [--gcs] [--hdfs]
        [--record]

`s3` is a server of this benchmark's own (`s3_files.py`), which costs next to nothing; `moto` is a test double of S3 in
Python, `gcs` one of Google Cloud Storage in Go. `split` reads every sample; `decode` also decodes each image on one
thread, which is nearer to what embed does. The clock starts when the first tar has arrived, as a worker reads for
hours. `share` is the remote rate over the local one. Rounds are interleaved, and the best of each counts.

`cpu_ms_mb` is CPU milliseconds for each megabyte in the best round: of the reader, of the process that fetches for it,
and of the server. All have the same cores, so `bound` is the share that no arrangement of that work can pass; `others`
are the cores that other programs had meanwhile. `raw` is the store alone: the same ranged reads, without a file, thrown
away. `scan` is what planning reads.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from clip_batch.plan.specs import expand_inputs
from clip_batch.samples import read_slice
from clip_batch.samples.decode import open_image
from clip_batch.samples.prefetch import Prefetcher
from clip_batch.samples.tar.scan import scan_tar
from clip_batch.storage.download import THREADS, pieces
from clip_batch.storage.store import Store
from clip_batch.storage.transfer import read_range, remote_file
from clip_batch.types import Sample, Shard, Slice
from tests import corpus
from tests.bench import result

AHEAD = 4
"""Tars that may be on local disk: so few that reading and fetching soon run at one pace, as they do over hours."""


def write(folder: str, tars: int, samples: int) -> None:
    images = [corpus.jpeg(seed, 256) + os.urandom(8_000) for seed in range(50)]  # padded to a photograph's 12 kB
    for number in range(tars):
        files = []
        for sample in range(samples):
            key = f"{number:03d}{sample:06d}"
            files += [(f"{key}.jpg", images[sample % 50]), (f"{key}.txt", b"a caption"), (f"{key}.json", b"{}")]
        corpus.write_tar(f"{folder}/{number:05d}.tar", files)


class Place(NamedTuple):
    """Where the tars lie: a folder's path or URL, the options that open it, the processes that serve it."""

    url: str
    options: dict[str, Any]
    servers: list[int]


class Pace(NamedTuple):
    """The rates of one pass: samples/s, MB/s; CPU ms for each MB of reader, fetcher, server; cores of others."""

    samples: float
    megabytes: float
    cpu: tuple[float, float, float]
    others: float


def split(shards: list[Shard], place: Place, work: Callable[[Sample], object]) -> Pace:
    """Read all tars but the first, for which the clock waits."""
    slices, plan, samples = [Slice(shard) for shard in shards], corpus.plan_of(), 0
    with Prefetcher(slices, place.options, AHEAD * (slices[0].shard.size or 0)) as files:
        next(iter(read_slice(slices[0], plan, place.options, files)))
        began, before = time.perf_counter(), spent(place.servers)
        for piece in slices[1:]:
            for item in read_slice(piece, plan, place.options, files):
                assert isinstance(item, Sample)
                work(item)
                samples += 1
        seconds = time.perf_counter() - began
        machine, *ours = (after - start for after, start in zip(spent(place.servers), before, strict=True))
    megabytes = sum(piece.shard.size or 0 for piece in slices[1:]) / 1e6
    reader, fetcher, server = (1e3 * one / megabytes for one in ours)
    return Pace(samples / seconds, megabytes / seconds, (reader, fetcher, server), (machine - sum(ours)) / seconds)


def spent(servers: list[int]) -> tuple[float, float, float, float]:
    """CPU seconds so far of the machine, this process, the processes that fetch for it, and the servers."""
    tick = os.sysconf("SC_CLK_TCK")
    with open("/proc/stat") as file:
        user, nice, system, _idle, _wait, *rest = map(int, file.readline().split()[1:9])

    def of(processes: Iterable[int]) -> float:
        fields = [Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split() for number in processes]
        return sum(int(one[11]) + int(one[12]) for one in fields) / tick

    children = [int(one) for path in Path("/proc/self/task").glob("*/children") for one in path.read_text().split()]
    fetchers = [
        one for one in children if b"clip_batch.samples.fetch_process" in Path(f"/proc/{one}/cmdline").read_bytes()
    ]
    return (user + nice + system + sum(rest)) / tick, time.process_time(), of(fetchers), of(servers)


def raw(shards: list[Shard], options: dict[str, Any]) -> int:
    """The number of bytes that a pool of readers receives and throws away."""
    with ThreadPoolExecutor(THREADS) as pool:
        wanted = [(remote_file(shard.url, options), *piece) for shard in shards for piece in pieces(0, shard.size or 0)]
        return sum(pool.map(lambda one: len(read_range(*one)), wanted))


def touch(sample: Sample) -> int:
    return zlib.adler32(sample.image or b"")


def decode(sample: Sample) -> object:
    return open_image(sample.image or b"", 10**8).convert("RGB").resize((224, 224))


@contextlib.contextmanager
def s3_files(folder: str) -> Iterator[Place]:
    """Serve the folder itself as a bucket."""
    command = [sys.executable, str(Path(__file__).with_name("s3_files.py")), folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout
            options = {"endpoint_url": f"http://127.0.0.1:{int(server.stdout.readline())}", "key": "k", "secret": "s"}
            yield Place("s3://bucket/tars", options, [server.pid])
        finally:
            server.kill()


@contextlib.contextmanager
def moto() -> Iterator[Place]:
    """A new bucket on a server that is started for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        options = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "k", "secret": "s"}
        for _ in range(300):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        remote_file("s3://bucket/x", options).fs.mkdir("bucket")
        yield Place("s3://bucket/tars", options, [server.pid])
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def gcs() -> Iterator[Place]:
    from tests.servers.gcs_server import BUCKET, running
    from tests.servers.processes import free_ports

    [port] = free_ports(1)
    with running(port) as server:
        options = {"endpoint_url": f"http://127.0.0.1:{port}", "token": "anon"}
        yield Place(f"gs://{BUCKET}/tars", options, [server])


@contextlib.contextmanager
def hadoop() -> Iterator[Place]:
    from tests.servers.hdfs_cluster import cluster, fetch_jars

    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder), fetch_jars()) as running:
        servers = [daemon.pid for daemon in running.daemons.values()]
        yield Place(f"{running.url}/tars", {"dfs.replication": "1"}, servers)


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--tars", type=int, default=6)
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=3, help="how often a pass reads each tar")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--moto", action="store_true", help="S3 as moto serves it, too")
    parser.add_argument("--gcs", action="store_true", help="GCS as fake-gcs-server serves it, too")
    parser.add_argument("--hdfs", action="store_true", help="HDFS too (needs Java: make services)")
    options = parser.parse_args()
    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        write(home, options.tars, options.samples)
        places = {"local": Place(home, {}, []), "s3": stack.enter_context(s3_files(home))}
        if options.moto:
            places["moto"] = stack.enter_context(moto())
        if options.gcs:
            places["gcs"] = stack.enter_context(gcs())
        if options.hdfs:
            places["hdfs"] = stack.enter_context(hadoop())
        shards: dict[str, list[Shard]] = {}
        for name, place in places.items():
            for path in sorted(Path(home).glob("*.tar")) if name in ("moto", "gcs", "hdfs") else ():
                Store(place.url, place.options).replace(path.name, path.read_bytes())
            shards[name] = expand_inputs([f"{place.url}/*.tar"], "tar", place.options).shards
        paces: dict[str, list[Pace]] = {name: [] for name in places}
        best: dict[str, dict[str, float]] = {name: {} for name in places}
        size = sum(shard.size or 0 for shard in shards["local"])

        def keep(name: str, what: str, rate: float) -> None:
            best[name][what] = max(best[name].get(what, 0.0), rate)

        for _ in range(options.rounds):
            for name, place in places.items():
                paces[name].append(split(shards[name] * options.repeats, place, touch))
                keep(name, "decode", split(shards[name][:2], place, decode).samples)
                if name != "local":
                    started = time.perf_counter()
                    assert raw(shards[name], place.options) == size
                    keep(name, "raw_mb", size / 1e6 / (time.perf_counter() - started))
                started = time.perf_counter()
                scan_tar(shards[name][0], options=place.options)
                keep(name, "scan_mb", (shards[name][0].size or 0) / 1e6 / (time.perf_counter() - started))
        local = max(paces["local"])
        report: dict[str, dict[str, Any]] = {}
        for name, found in best.items():
            pace = max(paces[name])
            report[name] = {
                "split": round(pace.samples),
                "split_mb": round(pace.megabytes),
                "split_share": round(pace.samples / local.samples, 2),
                "cpu_ms_mb": [round(one, 2) for one in pace.cpu],
                "bound": round(min(1.0, sum(local.cpu) * (os.cpu_count() or 1) / sum(pace.cpu)), 2),
                "others": round(pace.others, 2),
                "decode_share": round(found["decode"] / best["local"]["decode"], 2),
                **{what: round(rate) for what, rate in found.items()},
            }
    rows = []
    for name, line in report.items():
        if name != "local":
            what = f"15 kB samples read and split from {name} on the same cores"
            rates = line["split"], report["local"]["split"]
            rows.append(result.Row(name, what, "samples/s", *rates, "local files", line["split_share"], 0.8))
            rates = line["decode"], report["local"]["decode"]
            what = f"15 kB samples from {name}, decoded on one thread"
            rows.append(result.Row(f"{name}_decoded", what, "samples/s", *rates, "local files", line["decode_share"]))
    result.report("remote", "samples", options, rows, {"megabytes": round(size / 1e6), **report})


if __name__ == "__main__":
    main()
