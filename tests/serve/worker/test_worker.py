"""The stages over HTTP: requests can be repeated, run one at a time, stop cleanly and stay in the allowed folders."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from clip_batch.cli import main
from clip_batch.config import EmbedConfig, ServeConfig
from clip_batch.errors import ConfigError
from clip_batch.serve.http.errors import Refused
from clip_batch.serve.worker.allow import Allowed
from clip_batch.serve.worker.app import create_worker
from tests import ROOT
from tests.corpus import good_tar
from tests.servers.processes import free_ports

EXAMPLE = ROOT / "docs/examples/drive_by_http.py"


@contextlib.contextmanager
def app(*allow: Path, **options: Any) -> Iterator[TestClient]:
    worker = create_worker([str(path) for path in allow], ServeConfig(**options), EmbedConfig(device="cpu"))
    with TestClient(worker, base_url="http://localhost") as client:
        yield client


@contextlib.contextmanager
def workers(allow: Path, count: int, *options: str) -> Iterator[list[tuple[str, subprocess.Popen[bytes]]]]:
    """Yield (URL, process) of workers that answer."""
    command = [sys.executable, "-m", "clip_batch", "serve-worker", "--allow", str(allow), *options]
    started = [
        (f"http://127.0.0.1:{port}", subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL))
        for port in free_ports(count)
    ]
    try:
        for url, process in started:
            until = time.monotonic() + 300
            while True:
                assert process.poll() is None and time.monotonic() < until
                with contextlib.suppress(urllib.error.URLError):
                    get(f"{url}/healthz")
                    break
                time.sleep(0.05)
        yield started
    finally:
        for _, process in started:
            process.kill()
            process.communicate()


def get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def post(url: str, timeout: float = 300, **body: Any) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def tars(folder: Path, count: int = 4, samples: int = 12, side: int = 32) -> str:
    for number in range(count):
        good_tar(
            str(folder / f"{number:03d}.tar"),
            samples,
            seed=number,
            side=side,
            captions=[i != 3 for i in range(samples)],
        )
    return f"{folder}/{{000..{count - 1:03d}}}.tar"


def planned(folder: Path, url: str, samples: int, **options: Any) -> str:
    """Return OUT with a plan that was made over HTTP."""
    out = f"{folder}/out"
    body = {"input": [f"{folder}/*.tar"], "model": "fake:8", "partition_samples": samples}
    status, answer = post(f"{url}/v1/plan", output=out, **body, **options)
    assert status == 200, answer
    return out


def test_each_stage_answers_the_reference_of_what_it_committed_and_so_again(tmp_path: Path) -> None:
    spec = tars(tmp_path)
    out, index = f"{tmp_path}/out", f"{tmp_path}/index"
    with app(tmp_path) as client:
        body = {"output": out, "input": [spec], "model": "fake:8", "partition_samples": 12}
        plan = client.post("/v1/plan", json=body).json()
        assert (plan["state"], plan["partitions"]) == ("done", 4)
        assert client.post("/v1/plan", json=body).json() == plan
        other = client.post("/v1/plan", json={**body, "model": "fake:9"}).json()
        assert other["encoder"] != plan["encoder"], "nothing is committed, so the plan is replaced"
        assert client.post("/v1/plan", json=body).json() == plan

        early = client.post("/v1/merge", json={"output": out, "index": index})
        assert early.status_code == 409 and "\n" not in early.json()["detail"]
        for partition in range(4):
            answer = client.post("/v1/embed", json={"output": out, "partition": partition}).json()
            assert (answer["commit"]["rows"], answer["commit"]["partition"]) == (12, partition)
            name = next(name for name in answer["commit"]["files"] if name.startswith("img_emb"))
            assert len(answer["commit"]["files"][name]["sha256"]) == 64 and os.path.exists(f"{out}/{name}")
            assert client.post("/v1/embed", json={"output": out, "partition": partition}).json() == answer
        assert client.post("/v1/embed", json={"output": out, "partition": 4}).status_code == 400
        other = client.post("/v1/plan", json={**body, "model": "fake:9"})
        assert other.status_code == 400 and "fake:9" in other.json()["detail"]
        assert client.post("/v1/plan", json=body).json() == plan
        assert client.get("/v1/status", params={"output": out}).json()["done"] == 4
        assert len(os.listdir(f"{out}/img_emb")) == 4

        merge = {"output": out, "index": index, "shard_rows": 20, "queries": 5}
        early = client.post("/v1/merge", json={**merge, "task": "shard", "shard": 0})
        assert early.status_code == 400 and "not trained" in early.json()["detail"]
        trained = client.post("/v1/merge", json={**merge, "task": "train"}).json()
        assert trained["index_shards"] == 3 and trained["record"]["attempt"]
        for shard in (2, 0, 1):
            built = client.post("/v1/merge", json={**merge, "task": "shard", "shard": shard}).json()
            assert built["record"]["rows"] == 16
            assert client.post("/v1/merge", json={**merge, "task": "shard", "shard": shard}).json() == built
        assert client.post("/v1/merge", json={**merge, "task": "shard", "shard": 3}).status_code == 400
        manifest = client.post("/v1/merge", json={**merge, "task": "manifest"}).json()
        assert manifest["manifest"]["rows"] == 48
        assert client.post("/v1/merge", json={**merge, "task": "all"}).json() == manifest
        assert b'clip_batch_requests_total{route="/v1/embed",status="200"} 8.0' in client.get("/metrics").content
    assert main(["verify", "--output", out, "--deep"]) == 0
    assert main(["verify", "--index", index, "--deep"]) == 0


def test_nothing_is_read_or_written_elsewhere(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    tars(outside, 1)
    (inside / "link").symlink_to(outside)
    (inside / "all.txt").write_text(f"{outside}/000.tar\n")
    good = {"output": f"{inside}/out", "input": [f"{inside}/*.tar"], "model": "fake:8"}
    with app(inside) as client:
        for change in (
            {"output": f"{outside}/out"},
            {"output": f"{inside}/../outside/out"},
            {"output": f"{inside}/link/out"},
            {"output": f"{inside}-more/out"},
            {"output": f"file://{outside}/out"},
            {"output": "s3://bucket/out"},
            {"output": f"simplecache::file://{inside}/out"},
            {"output": "relative"},
            {"output": ""},
            {"output": "a\0b"},
            {"input": [f"{outside}/000.tar"]},
            {"input": [f"{inside}/link/*.tar"]},
            {"input": [f"{{{inside},{outside}}}/000.tar"]},
            {"input": [f"{tmp_path}/*/000.tar"]},
            {"input": ["/*"]},
            {"input": ["pipe:cat /etc/passwd"]},
            {"input": ["pipe:aws s3 cp s3://bucket/0.tar -"]},
            {"model": f"local-dir:{outside}"},
            {"pretrained": f"{outside}/weights.pt"},
        ):
            answer = client.post("/v1/plan", json={**good, **change})
            assert answer.status_code == 403, (change, answer.text)
            assert "\n" not in answer.json()["detail"]
        for listed in (f"@{inside}/all.txt", f"{inside}/all.txt"):
            assert client.post("/v1/plan", json={**good, "input": [listed]}).status_code == 400
        assert client.post("/v1/plan", json={**good, "storage_options": {"key": "k"}}).status_code == 422
        assert client.post("/v1/merge", json={"output": good["output"], "index": str(outside)}).status_code == 403
        assert client.get("/v1/status", params={"output": str(outside)}).status_code == 403
        assert main(["plan", "--input", f"{outside}/000.tar", "--model", "fake:8", "--output", good["output"]]) == 0
        led = client.post("/v1/embed", json={"output": good["output"], "partition": 0})
        assert led.status_code == 403  # the tars of a plan that was made elsewhere are checked too
    assert sorted(os.listdir(outside)) == ["000.tar"]


def test_allowed_urls() -> None:
    allowed = Allowed(["s3://bucket/runs/", "hdfs://name:8020/data"])
    for good in ("s3://bucket/runs", "s3://bucket/runs/a/b", "S3://bucket/runs/a", "hdfs://name:8020/data/x.tar"):
        allowed.check(good, "output")
    allowed.check_input("s3://bucket/runs/{000..999}.tar", "input.0")
    for bad in (
        "s3://bucket/runs2",
        "s3://bucket",
        "s3://bucket/runs/../other",
        "s3://bucket/runs/%2e%2e/other",
        "s3://bucket/runs/./a",
        "s3://bucket/runs//a",
        "s3://user@bucket/runs/a",
        "s3a://bucket/runs/a",
        "hdfs://name/data",
        "/etc",
        "s3://bucket/runs/a::file:///etc",
    ):
        with pytest.raises(Refused, match="not below"):
            allowed.check(bad, "output")
    with pytest.raises(Refused, match="not below"):
        allowed.check_input("s3://bucket/{runs,other}/0.tar", "input.0")
    for wrong in ([], [""], ["s3://bucket/../x"]):
        with pytest.raises(ConfigError, match="--allow"):
            Allowed(wrong)


def test_who_may_ask(tmp_path: Path) -> None:
    body = {"output": f"{tmp_path}/out", "partition": 0}
    with app(tmp_path) as client:
        page = client.post("/v1/embed", content=json.dumps(body), headers={"content-type": "text/plain"})
        assert page.status_code == 415  # a web page could send this without a preflight request
        assert client.post("/v1/embed", json=body, headers={"host": "evil.example"}).status_code == 400
        assert client.get("/openapi.json").json()["components"]["schemas"]["PlanWork"]["properties"]["precision"]
        missing = client.post("/v1/embed", json=body)
        assert missing.status_code == 400 and "no plan at" in missing.json()["detail"]
        assert client.post("/v1/embed", json={**body, "partition": "0"}).status_code == 422
    with app(tmp_path, token="secret", host="0.0.0.0") as client:
        assert client.post("/v1/embed", json=body).status_code == 401
        assert client.get("/healthz").status_code == 200
        known = client.post("/v1/embed", json=body, headers={"authorization": "Bearer secret", "host": "node7"})
        assert known.status_code == 400 and "no plan at" in known.json()["detail"]
    with pytest.raises(ConfigError, match="CLIP_BATCH_TOKEN"):
        create_worker([str(tmp_path)], ServeConfig(host="0.0.0.0"), EmbedConfig())


def test_failures_of_data_and_of_stages_are_told_apart(tmp_path: Path) -> None:
    tars(tmp_path, 2)
    with app(tmp_path) as client:
        out = f"{tmp_path}/out"
        body = {"output": out, "input": [f"{tmp_path}/*.tar"], "model": "fake:8", "partition_samples": 12}
        assert client.post("/v1/plan", json=body).json()["partitions"] == 2
        (tmp_path / "001.tar").unlink()
        gone = client.post("/v1/embed", json={"output": out, "partition": 1})
        assert gone.status_code == 422 and "001.tar" in gone.json()["detail"]
        assert client.post("/v1/embed", json={"output": out, "partition": 0}).status_code == 200


@pytest.mark.slow
def test_two_workers_asked_for_the_same_partition_commit_it_once(tmp_path: Path) -> None:
    tars(tmp_path, 2, 400, side=96)
    with workers(tmp_path, 2, "--batch-size", "2") as both, ThreadPoolExecutor(6) as pool:
        urls = [url for url, _ in both]
        out = planned(tmp_path, urls[0], 800)
        body = [pool.submit(post, f"{url}/v1/embed", output=out, partition=0) for url in urls * 3]
        answers = [one.result() for one in body]
        assert all(answer == answers[0] for answer in answers) and answers[0][0] == 200
        assert answers[0][1]["commit"]["rows"] == 800
    assert len(os.listdir(f"{out}/img_emb")) == len(os.listdir(f"{out}/_clip_batch/commits")) == 1
    assert main(["verify", "--output", out, "--deep"]) == 0


@pytest.mark.slow
def test_one_at_a_time_and_stopped_with_the_client_or_a_signal(tmp_path: Path) -> None:
    tars(tmp_path, 2, 2000, side=96)
    with workers(tmp_path, 2, "--batch-size", "1") as both:
        (url, first), (other, _) = both
        out = planned(tmp_path, url, 2000)
        assert post(f"{url}/v1/embed", output=out, partition=0, wait=0.2) == (
            202,
            {"state": "running", "what": f"embed {out}, partition 0"},
        )
        assert get(f"{url}/healthz")["at"] == f"embed {out}, partition 0"
        status, busy = post(f"{url}/v1/embed", output=out, partition=1)
        assert status == 503 and "is busy: embed" in busy["detail"]
        # A request for the running job waits for its end.
        assert post(f"{url}/v1/embed", output=out, partition=0)[1]["commit"]["rows"] == 2000

        with pytest.raises((TimeoutError, urllib.error.URLError)):  # a client that disconnects
            post(f"{url}/v1/embed", timeout=0.3, output=out, partition=1)
        until = time.monotonic() + 300
        while get(f"{url}/healthz")["at"]:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert len(os.listdir(f"{out}/img_emb")) == 1  # nothing is half done

        waiting: list[tuple[int, dict[str, Any]]] = []
        thread = threading.Thread(target=lambda: waiting.append(post(f"{url}/v1/embed", output=out, partition=1)))
        thread.start()
        while not get(f"{url}/healthz")["at"]:
            time.sleep(0.01)
        first.send_signal(signal.SIGTERM)
        thread.join(300)
        assert waiting[0][0] == 503 and "stopped" in waiting[0][1]["detail"]
        assert first.wait(300) == -signal.SIGTERM
        assert len(os.listdir(f"{out}/img_emb")) == 1
        assert post(f"{other}/v1/embed", output=out, partition=1)[1]["commit"]["rows"] == 2000
    assert main(["verify", "--output", out, "--deep"]) == 0


@pytest.mark.slow
def test_the_example_drives_a_run_though_a_worker_is_killed(tmp_path: Path) -> None:
    tars(tmp_path, 4, 600, side=64)
    out, index = tmp_path / "out", tmp_path / "index"
    with workers(tmp_path, 2, "--batch-size", "2") as both:
        options = json.dumps({"model": "fake:8", "partition_samples": 200})
        arguments = ["--input", f"{tmp_path}/*.tar", "--output", str(out), "--index", str(index), "--plan", options]
        command = [sys.executable, str(EXAMPLE), *arguments, *(url for url, _ in both)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while len(list(out.glob("_clip_batch/commits/*.json"))) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        both[0][1].kill()
        assert len(list(out.glob("_clip_batch/commits/*.json"))) < 12
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
        assert "2,400 samples embedded, 0 listed as failed" in said and "2,400 rows in" in said
        again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert again.splitlines()[-1] == said.splitlines()[-1]
    assert main(["gc", "--output", str(out), "--everything"]) == 0
    assert len(list((out / "img_emb").iterdir())) == 12
    assert main(["verify", "--output", str(out), "--deep"]) == 0
    assert main(["verify", "--index", str(index), "--deep"]) == 0
