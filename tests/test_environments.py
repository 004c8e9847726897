"""The wheel in an environment that somebody already has: nothing in it changes, and it works beside what is there."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest

from tests.conftest import NO_PYTHON
from tests.environments import CONSTRAINTS, Environment, build_wheel, interpreter
from tests.fabricated import clustered, make_out

pytestmark = pytest.mark.slow

HELD = {"numpy": "2.", "pandas": "3.", "pyarrow": "26.", "scikit-learn": "1."}
"""What the prepared environment holds, by the beginning of its version."""

SOUND = "No broken requirements found."
"""All that `pip check` says of a sound environment."""

RUNNING = ".".join(map(str, sys.version_info[:2]))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def constraints(folder: Path, without: set[str]) -> Path:
    """Write the tested versions of all but these packages, so that pip is free to choose theirs."""
    lines = CONSTRAINTS.read_text().splitlines(keepends=True)
    path = folder / "constraints.txt"
    path.write_text("".join(line for line in lines if line.partition("==")[0] not in without))
    return path


def merge(environment: Environment, folder: Path, *options: str) -> str:
    """Merge 3,000 fabricated rows in the environment, search the index and return its key."""
    images, texts = clustered(3_000, 16, 30)
    make_out(folder / "out", images, texts, [1000, 2000])
    index = folder / "index"
    environment.check("clip-batch", "merge", "--output", folder / "out", "--index", index, *options)
    environment.check("clip-batch", "verify", "--index", index, "--deep")
    (manifest,) = index.glob("*/manifest.json")
    return str(json.loads(manifest.read_text())["key"]["image"])


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_what_an_environment_holds_stays(version: str, wheel: Path, tmp_path: Path) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"{NO_PYTHON} {version}")
    environment = Environment(tmp_path / "theirs", python)
    environment.install("--constraint", CONSTRAINTS, *HELD)
    environment.borrow(code=version == RUNNING)
    before = environment.packages()
    assert all(before[name].startswith(f"{name}=={number}") for name, number in HELD.items()), before
    assert "torch" in before and "faiss-cpu" not in before
    environment.install("--constraint", constraints(tmp_path, set(HELD)), f"{wheel}[embed,merge,serve]")
    after = environment.packages()
    assert {name: after.get(name) for name in before} == before
    assert {"faiss-cpu", "open-clip-torch", "fastapi"} <= after.keys() and "autofaiss" not in after
    complaints = environment.run("python", "-m", "pip", "check").stdout.splitlines()
    # a record that is borrowed from another Python says so
    assert [line for line in complaints if "not supported on this platform" not in line] in ([], [SOUND])
    environment.check(
        "python", "-W", "error::ImportWarning", "-c", "import sklearn.linear_model, pandas, faiss, fastapi"
    )
    assert merge(environment, tmp_path) == "Flat"
    if version == RUNNING:
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            tar.add(__file__, "0.jpg")
        embed = environment.run("clip-batch", "embed", "--input", "0.tar", "--output", "new", "--model", "fake:8")
        assert "1 failed" in embed.stdout + embed.stderr


def test_autofaiss_with_its_pins(wheel: Path, tmp_path: Path) -> None:
    """The extra brings numpy 1 and what goes with it: an environment of its own."""
    python = interpreter("3.11") or interpreter("3.12")
    if python is None:
        pytest.skip(f"{NO_PYTHON} 3.11 or 3.12, for which numpy 1 has wheels")
    environment = Environment(tmp_path / "theirs", python)
    pinned = {"numpy", "pandas", "pyarrow", "fire", "autofaiss", "embedding-reader"}
    environment.install("--constraint", constraints(tmp_path, pinned), f"{wheel}[autofaiss]")
    environment.check("python", "-m", "pip", "check")
    packages = environment.packages()
    assert packages["numpy"].startswith("numpy==1.26.") and packages["pandas"].startswith("pandas==2.")
    assert merge(environment, tmp_path, "--index-key", "autofaiss") == "IVF256,Flat"
    build = (
        "from autofaiss import build_index; "
        "build_index('out/img_emb', index_path='a.index', index_infos_path='a.json', nb_cores=2)"
    )
    environment.check("python", "-c", build)
    assert json.loads((tmp_path / "a.json").read_text())["nb vectors"] == 3_000
    environment.install("--no-deps", "--constraint", CONSTRAINTS, "pyarrow")
    refused = environment.run("clip-batch", "verify", "--index", tmp_path / "index")
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 2 and "pyarrow requires NumPy 2.0" in line and "pip install --upgrade" in line
