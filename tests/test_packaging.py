"""The package as others install it: each library it imports is declared, and a lean environment says what it lacks."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import json
import re
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

from clip_batch.config.extras import EXTRAS, remedy
from tests import ROOT
from tests.environments import CONSTRAINTS, Environment, build_wheel

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
    for module in sorted(imported() | EXTRAS.keys()):
        extra = EXTRAS.get(module, "")
        assert module in BASE or extra
        names = {BROUGHT.get(module, name).lower().replace("_", "-") for name in homes[module]}
        assert names & {name.lower().replace("_", "-") for name in extras[extra]}, (module, extra)


def test_what_is_missing_is_named() -> None:
    assert remedy("torch._inductor") == "pip install 'clip-batch[embed]'"
    assert remedy("os") is None and remedy(None) is None


def test_all_that_a_command_lacks_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert remedy("faiss", "serve") == "pip install 'clip-batch[merge]'", "the others are installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert remedy("faiss", "serve") == "pip install 'clip-batch[embed,merge,serve]'"
    assert remedy("s3fs", "merge") == "pip install 'clip-batch[merge,s3]'"


@pytest.mark.slow
def test_a_wheel_in_a_lean_environment(tmp_path: Path) -> None:
    """It holds all it needs to plan and to tell its state; what it cannot do, it says how to mend."""
    wheel = build_wheel(tmp_path)
    files = ZipFile(wheel).namelist()
    assert {"clip_batch/py.typed", "clip_batch/demo/NOTICE", "clip_batch/serve/page/index.html"} <= set(files)
    assert not [name for name in files if name.startswith(("tests/", "docs/"))]
    lean = Environment(tmp_path / "lean")
    lean.install("--constraint", CONSTRAINTS, wheel)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(__file__, "0.jpg")

    planned = lean.run("clip-batch", "plan", "--input", "0.tar", "--output", "out", "--model", "fake:8")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(lean.run("clip-batch", "status", "--output", "out", "--json").stdout)["missing"] == [0]
    for extra, arguments in {
        "embed": ["embed", "--output", "out"],
        "embed,merge,serve": ["serve", "--index", "index"],
        "s3": ["status", "--output", "s3://bucket/out"],
        "gcs": ["status", "--output", "gs://bucket/out"],
        "slurm": ["submit", "slurm", "--output", "out"],
        "spark": ["submit", "spark", "--output", "out"],
    }.items():
        refused = lean.run("clip-batch", *arguments)
        last = refused.stderr.splitlines()[-1]
        assert refused.returncode in (1, 2) and f"pip install 'clip-batch[{extra}]'" in last, refused.stderr
