"""The import table of docs/architecture.md, read from the code; and what light commands do not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "clip_batch"

LAYERS = {
    "types": 0,
    "errors": 0,
    "extras": 0,
    "config": 1,
    "options": 1,
    "store": 1,
    "remote": 1,
    "hdfs": 1,
    "gcs": 1,
    "direct": 1,
    "ranged": 1,
    "retry": 1,
    "transfer": 1,
    "cache": 1,
    "web": 1,
    "documents": 2,
    "arrow": 2,
    "inputs": 2,
    "plan": 2,
    "part": 2,
    "urls": 2,
    "read": 2,
    "decode": 2,
    "encoders": 2,
    "index": 2,
    "concatenate": 2,
    "footprint": 2,
    "libfaiss": 2,
    "ondisk": 2,
    "metadata": 2,
    "manifest": 2,
    "job": 2,
    "vectors": 2,
    "recall": 2,
    "order": 2,
    "rerank": 2,
    "template": 2,
    "trial": 2,
    "duplicates": 2,
    "tombstones": 2,
    "lineage": 2,
    "foreign": 2,
    "databases": 2,
    "submission": 2,
    "slots": 2,
    "workers": 2,
    "stages": 3,
    "doctor": 3,
    "client": 4,
    "dataset": 4,
    "launch": 4,
    "export": 4,
    "filter": 4,
    "download": 4,
    "account": 4,
    "end2end": 5,
    "serve": 4,
    "demo": 5,
    "cli": 5,
    "__main__": 5,
    "__init__": 5,
}

HEAVY = {
    "torch": {"encoders", "launch", "demo", "dataset", "doctor", "serve"},
    "open_clip": {"encoders", "demo"},
    "simplejpeg": {"encoders"},
    "transformers": {"encoders", "demo"},
    "timm": {"encoders"},
    "huggingface_hub": {"encoders"},
    "safetensors": {"encoders", "demo", "serve"},
    "onnxruntime": {"encoders"},
    "openvino": {"encoders"},
    "faiss": {"libfaiss"},
    "autofaiss": {"index"},
    "fastapi": {"serve"},
    "uvicorn": {"serve"},
    "prometheus_client": {"serve"},
    "httpx2": {"client"},
    "sqlalchemy": {"databases"},
    "pymilvus": {"databases"},
    "milvus_lite": {"databases"},
    "pyspark": {"launch"},
    "submitit": {"launch"},
}
"""Libraries that live behind one module each (the demo's training script and doctor's report aside)."""


def modules() -> list[tuple[str, Path]]:
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in PACKAGE.rglob("*.py")]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = node.module == "clip_batch"
            found |= {f"clip_batch.{alias.name}" for alias in node.names} if inside else {node.module}
    return found


def test_every_module_has_a_layer() -> None:
    assert {name for name, _ in modules()} <= set(LAYERS)


@pytest.mark.parametrize(("home", "path"), modules(), ids=lambda value: str(value).rsplit("clip_batch/")[-1])
def test_imports_point_down(home: str, path: Path) -> None:
    if home in ("__init__", "demo"):
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "clip_batch" or len(parts) < 2:
            continue
        target = parts[1]
        if (home, target) == ("encoders", "demo") or target == "__version__":
            continue
        assert LAYERS[target] <= LAYERS[home], f"{path.name} imports {name}"
        if home == target == "stages":
            assert path.stem == parts[2], f"stages never import each other: {path.name} imports {name}"


@pytest.mark.parametrize(("home", "path"), modules(), ids=lambda value: str(value).rsplit("clip_batch/")[-1])
def test_heavy_libraries_live_behind_one_module(home: str, path: Path) -> None:
    for name in imports(path):
        library = name.split(".")[0]
        assert home in HEAVY.get(library, {home}), f"{path.name} imports {library}"


@pytest.mark.parametrize(
    "code",
    [
        "import clip_batch",
        "from clip_batch.cli import main; main(['--help'])",
        "from clip_batch.cli import main; main(['status', '--output', 'nowhere'])",
        "from clip_batch.cli import main; main(['plan', '--input', 'no.tar', '--output', 'no', '--model', 'fake:8'])",
    ],
)
def test_light_commands_load_nothing_heavy(code: str, tmp_path: Path) -> None:
    script = f"{code}\nimport sys\nprint('LOADED', sorted({set(HEAVY)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "LOADED []" in done.stdout


def test_public_surface() -> None:
    import clip_batch

    assert callable(clip_batch.embed)
    assert callable(clip_batch.make_plan)
    assert callable(clip_batch.merge)
    assert callable(clip_batch.Client)
    assert callable(clip_batch.Searcher)
    with pytest.raises(AttributeError, match="public names"):
        _ = clip_batch.nonsense
