"""New versions and readiness: no request fails, and a version that cannot be opened is not served."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from clip_batch.config import ServeConfig, StorageConfig
from clip_batch.encoders.families.fake import FakeEncoder
from clip_batch.errors import ConfigError
from clip_batch.index import removals
from clip_batch.search.searcher import Searcher
from clip_batch.serve.search.app import create_app, parse_indices
from clip_batch.storage.store import Store
from tests.servers.serving import ROWS, make_index, served


@pytest.fixture(scope="module")
def indices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    make_index(folder)
    make_index(folder / "larger", 2 * ROWS, 7)
    make_index(folder / "wider", ROWS, 7, "fake:9")
    return folder


@pytest.fixture
def index(indices: Path, tmp_path: Path) -> str:
    shutil.copytree(indices / "index", tmp_path / "index")
    return str(tmp_path / "index")


def publish(source: Path, index: str) -> str:
    """Make the version of another index the next version of this one."""
    version = (source / "index/CURRENT").read_text().strip()
    shutil.copytree(source / "index" / version, Path(index) / version)
    (Path(index) / "CURRENT.new").write_text(version)
    (Path(index) / "CURRENT.new").replace(Path(index) / "CURRENT")
    return version


def wait(what: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_new_version_takes_over_under_load(indices: Path, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    close = Searcher.close
    monkeypatch.setattr(Searcher, "close", lambda self: (closed.append(self.manifest.version), close(self))[1])
    old = (Path(index) / "CURRENT").read_text().strip()
    answers: list[tuple[int, str, int]] = []
    stop = threading.Event()
    with served(index, poll=0.1) as client:

        def load(number: int) -> None:
            while not stop.is_set():
                answer = client.post("/v1/search", json={"text": f"caption {number}", "k": 1000})
                found = answer.json()
                answers.append((answer.status_code, found.get("version", ""), len(found.get("hits", []))))

        threads = [threading.Thread(target=load, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        wait(lambda: len(answers) > 20)
        picture = client.post("/v1/search", json={"id": 0, "k": 1}).json()["hits"][0]["image"]
        new = publish(indices / "larger", index)
        wait(lambda: answers[-1][1] == new)
        seen = len(answers)
        wait(lambda: len(answers) > seen + 20)
        stop.set()
        for thread in threads:
            thread.join()
        assert {answer[0] for answer in answers} == {200}
        assert {answer[1:] for answer in answers} == {(old, ROWS), (new, 2 * ROWS)}
        wait(lambda: old in closed)
        assert new not in closed
        assert client.get(picture).status_code == 404  # in the new version that row is another picture
        text = client.get("/metrics").text
        assert f'clip_batch_index_rows{{index="index",version="{new}"}} {2.0 * ROWS}' in text
        assert old not in text
    assert sorted(closed) == sorted([old, new])


def test_a_request_keeps_the_version_it_began_with(indices: Path, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = (Path(index) / "CURRENT").read_text().strip()
    encode, gate, inside = FakeEncoder.encode_texts, threading.Event(), threading.Event()
    found: list[Any] = []

    def held(self: Any, texts: Any) -> Any:
        if "held" in texts:
            inside.set()
            assert gate.wait(20)
        return encode(self, texts)

    monkeypatch.setattr(FakeEncoder, "encode_texts", held)
    with served(index, poll=0.05) as client:
        wait(lambda: client.get("/readyz").status_code == 200)
        asked = {"text": "held", "k": 1000}
        thread = threading.Thread(target=lambda: found.append(client.post("/v1/search", json=asked).json()))
        thread.start()
        assert inside.wait(20)
        new = publish(indices / "larger", index)
        wait(lambda: client.get("/readyz").json()["indices"]["index"] == 2 * ROWS)
        assert client.post("/v1/search", json={"id": 0}).json()["version"] == new
        gate.set()
        thread.join()
    assert (found[0]["version"], len(found[0]["hits"])) == (old, ROWS)


def test_a_version_of_another_encoder_brings_it_along(indices: Path, index: str) -> None:
    with served(index, poll=0.05) as client:
        assert len(client.post("/v1/embed", json={"texts": ["a"]}).json()["texts"][0]) == 8
        new = publish(indices / "wider", index)
        wait(lambda: client.get("/v1/indices").json()["indices"][0]["version"] == new)
        assert len(client.post("/v1/embed", json={"texts": ["a"]}).json()["texts"][0]) == 9


def test_rows_that_are_removed_vanish_and_come_back_without_a_new_version(index: str) -> None:
    with served(index, poll=0.05) as client:
        first = client.post("/v1/search", json={"id": 0, "k": 1}).json()["hits"][0]
        digest = removals.add(Store(index), "key", [first["metadata"]["key"]])
        wait(lambda: len(client.post("/v1/search", json={"text": "a", "k": 1000}).json()["hits"]) == ROWS - 1)
        assert client.get(first["image"]).status_code in (400, 404)
        assert client.post("/v1/search", json={"id": 0}).status_code == 400
        assert client.get("/readyz").status_code == 200
        removals.undo(Store(index), digest)
        wait(lambda: len(client.post("/v1/search", json={"text": "a", "k": 1000}).json()["hits"]) == ROWS)
        assert client.post("/v1/search", json={"id": 0, "k": 1}).json()["hits"] == [first]
        removals.add(Store(index), "key", [first["metadata"]["key"]])
        wait(lambda: client.post("/v1/search", json={"id": 0}).status_code == 400)


@pytest.mark.parametrize("harm", ["manifest", "index", "metadata"])
def test_a_broken_version_does_not_take_over(indices: Path, index: str, harm: str) -> None:
    with served(index, poll=0.05) as client:
        wait(lambda: client.get("/readyz").status_code == 200)
        version = (indices / "larger/index/CURRENT").read_text().strip()
        target = Path(index) / version
        shutil.copytree(indices / "larger/index" / version, target)
        harmed = target / "manifest.json" if harm == "manifest" else sorted(target.rglob(f"*.{ENDS[harm]}"))[0]
        good = harmed.read_bytes()
        harmed.write_bytes(good[: len(good) // 2])
        (Path(index) / "CURRENT").write_text(version)
        wait(lambda: client.get("/readyz").json()["warnings"])
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["indices"]) == (200, {"index": ROWS})
        assert len(client.post("/v1/search", json={"text": "a", "k": 1000}).json()["hits"]) == ROWS
        harmed.write_bytes(good)
        wait(lambda: client.get("/readyz").json() == {"indices": {"index": 2 * ROWS}, "problems": {}, "warnings": {}})


ENDS = {"index": "index", "metadata": "arrow"}


def test_not_ready_until_the_index_can_be_opened(index: str) -> None:
    harmed = next(Path(index).rglob("*.arrow"))
    good = harmed.read_bytes()
    harmed.write_bytes(good[:100])
    with served(index, poll=0.05) as client:
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert "does not have the recorded size" in answer.json()["problems"]["index"]
        assert client.post("/v1/search", json={"text": "a"}).status_code == 503
        assert client.get("/healthz").status_code == 200
        assert client.get("/v1/indices").json()["indices"] == []
        harmed.write_bytes(good)
        wait(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/v1/search", json={"text": "a"}).status_code == 200


def test_not_ready_without_the_encoder_that_made_it(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Path(index) / (Path(index) / "CURRENT").read_text().strip() / "manifest.json"
    found = json.loads(manifest.read_text())
    with served(index, model="fake:9", poll=0) as client:
        wait(lambda: "being loaded" not in str(client.get("/readyz").json()["problems"]))
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert found["encoder"]["weights"][:12] in answer.json()["problems"]["index"]
        assert client.post("/v1/search", json={"text": "a"}).status_code == 503
        assert client.post("/v1/search", json={"id": 3}).status_code == 200  # needs no encoder


def test_several_indices(indices: Path, tmp_path: Path) -> None:
    app = create_app({"a": str(indices / "index"), "b/c": str(indices / "larger/index")})
    with TestClient(app) as client:
        assert client.get("/indices-list").json() == ["a", "b/c"]
        assert client.post("/v1/search", json={"text": "a"}).json()["index"] == "a"
        found = client.post("/v1/search", json={"text": "a", "k": 1000, "index": "b/c"}).json()
        assert (found["index"], len(found["hits"])) == ("b/c", 2 * ROWS)
        asked = {"text": "a", "num_images": 3, "modality": "image", "indice_name": "b/c"}
        assert len(client.post("/knn-service", json=asked).json()) == 3
        assert len(app.state.service.indices._encodings._tasks) == 1  # one encoder for both


def test_names_of_indices(tmp_path: Path) -> None:
    assert parse_indices(["x/y"]) == {"index": "x/y"}
    assert parse_indices(["x", "y"]) == {"index0": "x", "index1": "y"}
    assert parse_indices(["a=x", "s3://b/k=v/i"]) == {"a": "x", "index1": "s3://b/k=v/i"}
    with pytest.raises(ConfigError, match="two indices are named 'a'"):
        parse_indices(["a=x", "a=y"])
    with pytest.raises(ConfigError, match="no index at"):
        create_app({"a": str(tmp_path)}, ServeConfig(), StorageConfig())
