"""The folders of clip_batch are layers: no folder imports a later one, no files import in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT
from tests.corpus import good_tar

PACKAGE = ROOT / "clip_batch"

FOLDERS = (
    "config",
    "client",
    "storage",
    "samples",
    "encoders",
    "plan",
    "embeddings",
    "index",
    "search",
    "launch",
    "export",
    "serve",
    "api",
    "demo",
    "cli",
)
"""Each folder may import those before it; `errors` and `types` come before all, the public `__init__` after."""

LOOSE = ("__init__", "__main__", "errors", "types")
"""The only modules outside the folders."""

HEAVY = {
    "torch": {"encoders", "search/heads", "launch/doctor", "export/dataset", "demo"},
    "torchvision": {"encoders"},
    "open_clip": {"encoders", "demo"},
    "simplejpeg": {"encoders/preprocess"},
    "transformers": {"encoders"},
    "timm": {"encoders/families"},
    "huggingface_hub": {"encoders"},
    "safetensors": {"encoders/families", "search/heads", "demo"},
    "onnxruntime": {"encoders/onnx_runtime"},
    "openvino": {"encoders/families"},
    "faiss": {"index/ann/libfaiss"},
    "autofaiss": {"index/ann/index_keys"},
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
    "prometheus_client": {"serve"},
    "httpx2": {"client"},
    "hdfs_native": {"storage/hdfs"},
    "gcsfs": {"storage/gcs"},
    "sqlalchemy": {"export/databases/sql"},
    "pymilvus": {"export/databases/milvus"},
    "milvus_lite": {"export/databases/milvus"},
    "pyspark": {"launch"},
    "py4j": {"launch/spark"},
    "submitit": {"launch/slurm"},
}
"""The folders or files that alone may import a large library."""


def module_of(path: Path) -> str:
    """The dotted name of a file of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(name: str) -> frozenset[str]:
    """The modules that a module imports anywhere in it, those of type checking alone too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{name} has a relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = members & set(FILES)
            found |= submodules
            if len(submodules) < len(members):
                found.add(node.module)
    return frozenset(found)


def folder_of(name: str) -> str:
    """The folder directly below clip_batch in which a module lies, or the loose module itself."""
    return [*name.split("."), "__init__"][1]


def is_within(name: str, home: str) -> bool:
    """Whether a module is the file `home`, or lies in the folder `home`; both without `clip_batch/`."""
    return f"{'/'.join(name.split('.')[1:])}/".startswith(f"{home}/")


def rank(folder: str) -> int:
    """The place of a folder in the order of imports."""
    order = ("errors", "types", *FOLDERS, "__main__", "__init__")
    assert folder in order, f"clip_batch/{folder} has no place in FOLDERS"
    return order.index(folder)


def test_everything_lies_in_a_folder() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(LOOSE)
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FOLDERS)
    assert len(FOLDERS) <= 15


@pytest.mark.parametrize("name", FILES)
def test_imports_point_to_earlier_folders(name: str) -> None:
    for target in imports(name) & set(FILES):
        if name != "clip_batch" and target == "clip_batch":
            continue  # __version__, which setup.cfg reads from there
        assert rank(folder_of(target)) <= rank(folder_of(name)), f"{name} imports {target}"


def test_no_circle_of_imports() -> None:
    graph = {name: {target for target in imports(name) if target in FILES and target != "clip_batch"} for name in FILES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("name", FILES)
def test_heavy_libraries_have_a_home(name: str) -> None:
    for target in imports(name):
        homes = HEAVY.get(target.split(".")[0])
        assert homes is None or any(is_within(name, home) for home in homes), f"{name} imports {target}"


@pytest.mark.parametrize("library", HEAVY)
def test_each_home_imports_its_library(library: str) -> None:
    """A home that does not would let the library spread there unseen."""
    users = [name for name in FILES if library in {target.split(".")[0] for target in imports(name)}]
    for home in HEAVY[library]:
        assert any(is_within(name, home) for name in users), f"{home} does not import {library}"


def test_no_two_classes_share_a_name() -> None:
    homes: dict[str, list[str]] = {}
    for name, path in FILES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(name)
    assert not {kind: where for kind, where in homes.items() if len(where) > 1}


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
    _check_light(code, tmp_path)


@pytest.mark.parametrize("model", [["fake:8"], ["demo", "--no-try-model"]])
def test_plan_loads_nothing_heavy(model: list[str], tmp_path: Path) -> None:
    words = ["plan", "--input", good_tar(f"{tmp_path}/a.tar", 2), "--output", f"{tmp_path}/out", "--model", *model]
    _check_light(f"from clip_batch.cli import main; assert main({words}) == 0", tmp_path)


def _check_light(code: str, tmp_path: Path) -> None:
    script = f"{code}\nimport sys\nprint('LOADED', sorted({set(HEAVY)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "LOADED []" in done.stdout
