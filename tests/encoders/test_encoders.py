"""Models by name: registering one, fetching ahead, never on a worker; those without a text side from plan to page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_batch import encoders
from clip_batch.cli import main
from clip_batch.encoders import hub
from clip_batch.errors import EncoderError
from clip_batch.types import EncoderSpec
from tests import ROOT, corpus, tiny
from tests.servers.serving import served

ADAPTER = Path(__file__).with_name("adapter.py")
DOCUMENT = ROOT / "docs" / "models.md"


def test_the_adapter_in_the_document_is_the_one_tested() -> None:
    assert f"```python\n{ADAPTER.read_text()}```" in DOCUMENT.read_text()
    assert len(ADAPTER.read_text().splitlines()) < 50


@pytest.mark.slow
def test_another_distribution_registers_a_family(tmp_path: Path) -> None:
    shutil.copy(ADAPTER, tmp_path / "simpleshot.py")
    (tmp_path / "simpleshot-1.dist-info").mkdir()
    (tmp_path / "simpleshot-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: simpleshot\nVersion: 1\n"
    )
    entry = "[clip_batch.encoders]\nsimpleshot = simpleshot\n"
    (tmp_path / "simpleshot-1.dist-info" / "entry_points.txt").write_text(entry)
    np.save(tmp_path / "matrix.npy", np.random.default_rng(0).standard_normal((8, 768), dtype=np.float32))
    tar = corpus.good_tar(str(tmp_path / "a.tar"), 12)
    command = [sys.executable, "-m", "clip_batch", "embed", "--input", tar, "--output", str(tmp_path / "out")]
    flags = ["--model", "simpleshot:16", "--pretrained", "matrix.npy", "--device", "cpu", "--no-progress"]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    assert "12 samples embedded" in done.stdout
    assert main(["verify", "--output", str(tmp_path / "out"), "--deep"]) == 0


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(EncoderError, match="no family of models is called 'nonsense': there are fake, "):
        encoders.resolve("nonsense:x")


FILES = {"config.json": "{}", "model.safetensors": "weights", "preprocessor_config.json": "{}", "vocab.txt": "a"}
OTHERS = {"README.md": "words", ".gitattributes": "", "flax_model.msgpack": "x", "pytorch_model.bin": "the same again"}


def write(folder: Path, files: dict[str, str]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return str(folder)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, name: str, files: dict[str, str]) -> None:
    """A model in the cache as a download leaves it."""
    home = cache / f"models--{name.replace('/', '--')}"
    write(home / "snapshots" / "0123", files)
    write(home / "refs", {"main": "0123"})


def test_a_model_is_the_same_wherever_it_lies(tmp_path: Path, cache: Path) -> None:
    plain = encoders.resolve(f"hf:{write(tmp_path / 'a', FILES)}").weights
    assert encoders.resolve(f"hf:{write(tmp_path / 'b', FILES | OTHERS)}").weights == plain
    cached(cache, "some/model", FILES | OTHERS)
    assert encoders.resolve("hf:some/model").weights == plain
    for name in FILES:
        assert encoders.resolve(f"hf:{write(tmp_path / name, FILES | {name: '{ }'})}").weights != plain


def test_digests_of_folders_load_no_torch(tmp_path: Path) -> None:
    folder = write(tmp_path, FILES)
    code = (
        f"from clip_batch import encoders; encoders.resolve('hf:{folder}'); import sys; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_worker_never_downloads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def asked(*_: Any, **__: Any) -> None:
        pytest.fail("it asked the hub")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", asked)
    spec = EncoderSpec("hf:some/model", "", "0" * 64)
    with pytest.raises(EncoderError, match="clip-batch prefetch"):
        encoders.load(spec, "cpu")
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    cached(cache, "some/model", {"config.json": "{}"})  # as another program left it
    with pytest.raises(EncoderError, match="clip-batch prefetch"), hub.offline():
        hub.folder("some/model")


def test_the_plan_node_fetches_what_is_relevant_and_no_more(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    fetched: list[list[str]] = []

    def snapshot(name: str, local_files_only: bool = False, allow_patterns: list[str] | None = None) -> str:
        if local_files_only:
            raise OSError("not here")
        fetched.append(allow_patterns or [])
        return write(tmp_path / "fetched", FILES)

    names = [*FILES, *OTHERS, "onnx/model.onnx", "onnx/config.json"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert encoders.resolve("hf:some/model").weights
    assert fetched == [sorted(FILES)]


def test_prefetch_tells_whether_it_is_the_planned_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write(tmp_path / "model", FILES), str(tmp_path / "out")
    tar = corpus.good_tar(str(tmp_path / "a.tar"), 3)
    assert main(["plan", "--input", tar, "--output", out, "--model", f"hf:{folder}"]) == 0
    assert main(["prefetch", "--model", f"hf:{folder}", "--json"]) == 0
    assert main(["prefetch", "--output", out]) == 0
    write(tmp_path / "model", {"vocab.txt": "b"})
    capsys.readouterr()
    assert main(["prefetch", "--output", out]) == 2
    assert "planned were" in capsys.readouterr().err


def embedded(tmp_path: Path, model: str) -> tuple[str, str]:
    """OUT and INDEX of two small tars by a model, by the commands."""
    tars = [corpus.good_tar(str(tmp_path / f"{number}.tar"), 20, number) for number in range(2)]
    out, index = str(tmp_path / "out"), str(tmp_path / "index")
    flags = ["--input", *tars, "--output", out, "--model", model, "--device", "cpu", "--partition-count", "2"]
    assert main(["embed", *flags, "--no-progress"]) == 0
    assert main(["verify", "--output", out, "--deep"]) == 0
    assert main(["merge", "--output", out, "--index", index]) == 0
    assert main(["verify", "--index", index, "--deep"]) == 0
    return out, index


@pytest.mark.slow
def test_a_transformers_model_from_plan_to_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"hf:{tiny.clip(tmp_path / 'model')}"
    _, index = embedded(tmp_path, model)
    (tmp_path / "query.jpg").write_bytes(corpus.jpeg(1_000_003 + 4))
    capsys.readouterr()
    assert main(["search", "--index", index, "--image", str(tmp_path / "query.jpg"), "--json", "-k", "1"]) == 0
    [hit] = json.loads(capsys.readouterr().out)
    assert hit["metadata"]["key"] == "001000004" and hit["score"] > 0.999
    text = ["search", "--index", index, "--text", "caption 4 of tar 1", "--modality", "text", "--json", "-k", "1"]
    moved = shutil.copytree(tmp_path / "model", tmp_path / "moved")
    shutil.rmtree(tmp_path / "model")
    assert main(text) == 2
    capsys.readouterr()
    assert main([*text, "--model", f"hf:{moved}"]) == 0
    [hit] = json.loads(capsys.readouterr().out)
    assert hit["score"] > 0.999


@pytest.mark.slow
def test_a_model_of_images_alone_from_plan_to_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import base64

    out, index = embedded(tmp_path, f"hf:{tiny.dinov2(tmp_path / 'model')}")
    assert not os.path.exists(f"{out}/text_emb")
    query = corpus.jpeg(1_000_003 + 4)
    (tmp_path / "query.jpg").write_bytes(query)
    capsys.readouterr()
    assert main(["search", "--index", index, "--image", str(tmp_path / "query.jpg"), "--json", "-k", "1"]) == 0
    [hit] = json.loads(capsys.readouterr().out)
    assert hit["metadata"]["key"] == "001000004" and hit["metadata"]["caption"] == "caption 4 of tar 1"
    assert main(["search", "--index", index, "--text", "caption"]) == 2
    error = capsys.readouterr().err
    assert "no text side" in error and error.count("\n") == 1
    with served(index) as client:
        image = base64.b64encode(query).decode()
        found = client.post("/v1/search", json={"image": image, "k": 2}).json()
        assert found["hits"][0]["metadata"]["key"] == "001000004"
        row, vector = found["hits"][0]["id"], client.post("/v1/embed", json={"images": [image]}).json()["images"][0]
        for asked in ({"id": row}, {"embedding": vector}):
            assert client.post("/v1/search", json={**asked, "k": 1}).json()["hits"][0]["id"] == row
        for place, body in (
            ("/v1/search", {"text": "a"}),
            ("/v1/search", {"queries": [{"id": row}, {"text": "a"}]}),
            ("/v1/embed", {"texts": ["a"]}),
            ("/knn-service", {"text": "a", "modality": "image", "num_images": 3, "indice_name": "index"}),
        ):
            refused = client.post(place, json=body)
            assert refused.status_code == 400 and "no text side" in refused.json()["detail"], place
        assert client.get("/v1/indices").json()["indices"][0]["text"] is False
        assert client.get("/readyz").status_code == 200
