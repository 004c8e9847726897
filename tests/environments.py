"""Environments of other people's, into which the tests install the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path

from tests import ROOT

CONSTRAINTS = ROOT / "constraints.txt"

HEAVY = re.compile(r"(torch|torchvision|triton|nvidia-.*|cuda-.*)")
"""Distributions of some gigabytes, which no test installs again."""


def build_wheel(folder: Path) -> Path:
    """Build the package's wheel in `folder`, from a copy of the sources, and return its path."""
    source = folder / "source"
    shutil.copytree(ROOT / "clip_batch", source / "clip_batch", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheels = ["--quiet", "--no-deps", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *wheels, source], check=True)
    (wheel,) = folder.glob("clip_batch-*.whl")
    return wheel


def interpreter(version: str) -> str | None:
    """Return the path of a Python of this version ("3.12"): this one, one in PATH or pyenv's; None without any."""
    if version == ".".join(map(str, sys.version_info[:2])):
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for path in (shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python{version}")):
        # a shim of pyenv's is in PATH also where it runs nothing
        if path and subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0:
            return str(path)
    return None


class Environment:
    """A virtual environment made by the interpreter `python` in `folder`."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.variables = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CLIP_BATCH_"))
        }
        self.variables["PATH"] = os.defpath  # no spark-submit of this environment
        subprocess.run([python, "-m", "venv", folder], check=True)

    def run(self, name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in the folder above it."""
        command = [self.bin / name, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=self.folder.parent, env=self.variables)

    def check(self, name: str, *arguments: str | Path) -> str:
        """Run a program likewise and return what it prints; an exit code other than 0 fails the test."""
        done = self.run(name, *arguments)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    def install(self, *requirements: str | Path) -> None:
        """Install with pip, without compiling."""
        self.check("python", "-m", "pip", "install", "--quiet", "--no-compile", *requirements)

    def packages(self) -> dict[str, str]:
        """Return what `pip freeze` lists: name -> the line."""
        lines = self.check("python", "-m", "pip", "freeze").splitlines()
        return {re.split("==| @ ", line)[0].lower().replace("_", "-"): line for line in lines}

    def borrow(self, pattern: re.Pattern[str] = HEAVY, code: bool = False) -> None:
        """Record the running environment's distributions of these names as installed, with what they require.

        With `code` they can be imported too, by links: for an environment of the same Python.
        """
        purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(self.check("python", "-c", purelib).strip())
        links = self.folder / "links"
        links.mkdir()
        for one in distributions():
            if not pattern.fullmatch(one.metadata["Name"].lower().replace("_", "-")):
                continue
            home = Path(str(one.locate_file("")))
            tops = {file.parts[0] for file in one.files or () if file.parts[0] != ".."}
            (record,) = (top for top in tops if top.endswith(".dist-info"))
            # a copy: what pip removes by a record never is the running environment's
            shutil.copytree(home / record, site / record)
            _link(links, (home / top for top in tops - {record, "__pycache__"} if code))
        (site / "links.pth").write_text(f"{links}\n")


def _link(folder: Path, targets: Iterable[Path]) -> None:
    for target in targets:
        if not (folder / target.name).is_symlink():
            (folder / target.name).symlink_to(target)
