"""tests/bench/gpu.sh measures on a CPU what it can, and a part that fails leaves the others standing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.bench import gpu
from tests.bench.gpu_parts import BUDGETS, Options, Part, Tried

CPU = ["--device", "cpu", "--quick", "--minutes", "30", "--budget", *(f"{part}=400" for part in BUDGETS)]

NOT_THERE = """
    aiobotocore autofaiss boto3 botocore cn_clip embedding_reader fastapi gcsfs hdfs_native moto openvino playwright
    prometheus_client pymilvus pyspark s3fs schemathesis sqlalchemy starlette submitit torchdata uvicorn webdataset
"""
"""Libraries that a machine for training models has not, and that no part needs."""

HIDE = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_THERE.split()}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""
"""A sitecustomize.py that hides them."""


def gpu_sh(out: Path, *options: str) -> tuple[list[str], dict[str, Any]]:
    """The lines that the script printed, and the parts of gpu.json."""
    command = ["bash", "tests/bench/gpu.sh", str(out), *options]
    hidden = out.parent / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(HIDE)
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(hidden)}
    environment["PYTEST_ADDOPTS"] = "-p no:schemathesis"  # its plugin would be loaded in the tests' part
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} == {"gpu.json", "parts.log", "table.txt"}
    return done.stdout.splitlines(), json.loads((out / "gpu.json").read_text())["figures"]["parts"]


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    lines, parts = gpu_sh(tmp_path / "out", *CPU, "--model", "demo")
    printed = (tmp_path / "out" / "table.txt").read_text().splitlines()
    assert lines[-len(printed) :] == printed and len(printed) < 70
    assert {*parts} == {*BUDGETS} and {part["error"] for part in parts.values()} == {""}
    rows = {row["key"]: row["ours"] for row in json.loads((tmp_path / "out" / "gpu.json").read_text())["rows"]}
    for key in (
        "device_product_0",
        "model_demo_eager_8_images",
        "files_demo_compiled_8_pairs",
        "files_demo_1",
        "files_demo_1_4",
    ):
        assert rows[key] > 0, key
    for key in ("files_demo_2", "decode_fast_256_1", "peer_curator", "peer_clip_retrieval"):
        assert rows[key] > 0, key
    assert "device_product_0" in rows and "needs CUDA" in "".join(parts["fp8"]["notes"] + parts["decode"]["notes"])
    assert parts["files"]["figures"]["demo"]["threads"]["decode"]
    assert "Error" not in "".join(note for part in parts.values() for note in part["notes"])
    assert rows["tests_failed"] == rows["tests_error"] == 0 < rows["tests_passed"] + rows["tests_skipped"]
    assert parts["index"]["notes"]


@pytest.mark.slow
def test_a_part_that_fails_leaves_the_others_standing(tmp_path: Path) -> None:
    only = ["--only", "decode", "model", "files", "device"]
    lines, parts = gpu_sh(tmp_path / "out", *CPU, "decode=0.2", "--model", "nonsuch", *only)
    assert parts["decode"]["error"] == "stopped after its 0 s" and not parts["decode"]["rows"]
    assert "nonsuch" in parts["model"]["notes"][0] and "nonsuch" in parts["files"]["notes"][0]
    assert parts["device"]["rows"] and not parts["device"]["error"]
    assert "decode (0 s): stopped after its 0 s" in lines


def test_parts_are_left_out_when_the_time_is_up(tmp_path: Path) -> None:
    lines, parts = gpu_sh(tmp_path / "out", "--minutes", "0")
    assert {part["error"] for part in parts.values()} == {"left out, because the time is up"}
    assert lines[-1] == "index (0 s): left out, because the time is up"


def test_a_part_keeps_what_it_has_when_something_fails(tmp_path: Path) -> None:
    part = Part(Options("model", str(tmp_path), "cpu", ["demo"], "fp32", False, 60.0))

    def fails() -> None:
        part.row("first", "the first", "images/s", 1234.56, 2000.0, "all")
        raise ValueError("two\nlines")

    part.attempt("work", 5, fails)
    part.attempt("long work", 1000, fails)
    kept = Tried.load(part.options.results)
    assert kept.notes[0] == "work: ValueError: two lines"
    assert kept.notes[1].startswith("long work: left out, because only 5")
    assert gpu.table({"model": kept})[1].split() == ["the", "first", "1,235", "images/s", "=", "0.617", "x", "all"]
    assert Tried.load(f"{tmp_path}/decode.json") == Tried()


@pytest.mark.slow
def test_a_failing_test_says_why_at_once(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_bad():\n    print('1 - cosine 3e-5')\n    assert 3e-5 < 1e-6\n")
    command = [sys.executable, "-m", "pytest", "-n1", "-p", "tests.bench.gpu_parts.report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    line = next(line for line in done.stdout.splitlines() if line.startswith("failed: "))
    assert "test_bad: assert 3e-05 < 1e-06; printed: 1 - cosine 3e-5" in line
    assert done.stdout.index(line) < done.stdout.index("= FAILURES =")
