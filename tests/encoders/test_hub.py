"""Model folders: the same model wherever it lies, downloaded ahead and never by a worker."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clip_batch import encoders
from clip_batch.cli import main
from clip_batch.encoders import hub
from clip_batch.errors import EncoderError
from clip_batch.types import EncoderSpec
from tests import corpus

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
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert encoders.resolve("hf:some/model").weights
    assert fetched == [sorted(FILES)]


def test_prefetch_tells_whether_it_is_the_planned_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write(tmp_path / "model", FILES), str(tmp_path / "out")
    tar = corpus.good_tar(str(tmp_path / "a.tar"), 3)
    assert main(["plan", "--input", tar, "--output", out, "--model", f"hf:{folder}", "--no-try-model"]) == 0
    assert main(["prefetch", "--model", f"hf:{folder}", "--json"]) == 0
    assert main(["prefetch", "--output", out]) == 0
    write(tmp_path / "model", {"vocab.txt": "b"})
    capsys.readouterr()
    assert main(["prefetch", "--output", out]) == 2
    assert "planned were" in capsys.readouterr().err


def test_where_the_hub_has_no_name_it_is_not_tried_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    assert not hub.reachable()
    started = time.monotonic()
    for model, tag in (("hf:someone/something", ""), ("ViT-B-32", "laion2b_e16"), ("hf-hub:someone/something", "")):
        with pytest.raises(EncoderError, match=r"found|cached|prefetch"):
            encoders.resolve(model, tag)
    assert time.monotonic() - started < 20, "it was tried again and again"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.reachable()


def test_a_long_message_ends_with_a_whole_word() -> None:
    assert hub.line(OSError("word " * 100)) == "word " * 59 + "..."
    assert hub.line(OSError("a\nb")) == "a b"
