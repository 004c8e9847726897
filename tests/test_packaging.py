"""The package as others install it: each library it imports is declared, and a lean environment says what it lacks."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

from clip_batch.config.extras import EXTRAS, remedy
from tests import ROOT

BROUGHT = {
    "py4j": "pyspark",
    "grpc": "pymilvus",
    "typing_extensions": "pydantic",
    "tokenizers": "transformers",
    "starlette": "fastapi",
    "botocore": "s3fs",
}
"""Libraries that come with another one."""

BASE = {"numpy", "pyarrow", "fsspec", "pydantic", "yaml", "rich", "httpx2", "PIL", "typing_extensions"}


def declared() -> dict[str, set[str]]:
    """Extra -> the distributions it names itself, "" for what is always installed."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    sections = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    return {
        extra: {re.split(r"[<>\[=]", line)[0] for line in lines.splitlines() if line and not line.startswith("#")}
        for extra, lines in sections.items()
    }


def imported() -> set[str]:
    names: set[str] = set()
    for path in (ROOT / "clip_batch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"clip_batch"}


def test_each_library_is_declared() -> None:
    assert imported() - BASE <= EXTRAS.keys()
    homes, extras = importlib.metadata.packages_distributions(), declared()
    homes = {"autofaiss": ["autofaiss"], **homes}  # which Python 3.13 does without
    for module in sorted(imported() | EXTRAS.keys()):
        extra = EXTRAS.get(module, "")
        assert module in BASE or extra
        names = {BROUGHT.get(module, name).lower().replace("_", "-") for name in homes[module]}
        assert names & {name.lower().replace("_", "-") for name in extras[extra]}, (module, extra)


def test_what_is_missing_is_named() -> None:
    assert remedy("torch._inductor") == "pip install 'clip-batch[embed]'"
    assert remedy("os") is None and remedy(None) is None


@pytest.mark.slow
def test_a_wheel_in_a_lean_environment(tmp_path: Path) -> None:
    """It holds all it needs to plan and to tell its state; what it cannot do, it says how to mend."""
    source = tmp_path / "source"  # it is built where it lies
    shutil.copytree(ROOT / "clip_batch", source / "clip_batch", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheels = ["--quiet", "--no-deps", "--wheel-dir", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *wheels, source], check=True)
    (wheel,) = tmp_path.glob("clip_batch-*.whl")
    files = ZipFile(wheel).namelist()
    assert {"clip_batch/py.typed", "clip_batch/demo/NOTICE", "clip_batch/serve/page/index.html"} <= set(files)
    assert not [name for name in files if name.startswith(("tests/", "docs/"))]
    python = tmp_path / "lean/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "lean"], check=True)
    constraints = ["--constraint", ROOT / "constraints.txt"]
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CLIP_BATCH_"))}
    bare["PATH"] = os.defpath  # no spark-submit of this environment
    subprocess.run([python, "-m", "pip", "install", "--quiet", *constraints, wheel], check=True, env=bare)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(__file__, "0.jpg")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [tmp_path / "lean/bin/clip-batch", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=bare)

    planned = run("plan", "--input", "0.tar", "--output", "out", "--model", "fake:8")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(run("status", "--output", "out", "--json").stdout)["missing"] == [0]
    for extra, arguments in {
        "embed": ["embed", "--output", "out"],
        "serve": ["serve", "--index", "index"],
        "s3": ["status", "--output", "s3://bucket/out"],
        "gcs": ["status", "--output", "gs://bucket/out"],
        "slurm": ["submit", "slurm", "--output", "out"],
        "spark": ["submit", "spark", "--output", "out"],
    }.items():
        refused = run(*arguments)
        last = refused.stderr.splitlines()[-1]
        assert refused.returncode in (1, 2) and f"pip install 'clip-batch[{extra}]'" in last, refused.stderr
