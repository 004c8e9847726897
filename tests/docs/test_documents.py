"""What the documents name exists: commands, flags, links, files and modules; and the jobs run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from clip_batch.cli import COMMANDS, main
from tests import ROOT
from tests.test_layers import FILES, FOLDERS, PACKAGE

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("s*/README.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_flags_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text().replace("\\\n", " ")
    for command, rest in re.findall(r"clip-batch +((?:submit +)?[a-z0-9]+)((?: +[^\n`]*)?)", text):
        if command not in COMMANDS:
            assert not rest.strip().startswith("--"), f"no command {command}"
            continue
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        known = capsys.readouterr().out
        for flag in re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)", rest.split("#")[0]):
            assert flag in known, f"{page.name}: {command} has no {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_paths_exist(page: Path) -> None:
    """Files of the repository, and paths below the package that begin with one of its folders."""
    starts = "|".join((*FOLDERS, "clip_batch", "configs", "docs", "jobs", "slurm", "spark", "tests"))
    text = re.sub(r"https?://\S+", "", page.read_text())
    for path in re.findall(rf"(?<![\w./-])((?:{starts})/(?:[\w-]+/)*(?:[\w-]+\.(?:py|sbatch|sh|md|ya?ml|txt))?)", text):
        assert (ROOT / path).exists() or (PACKAGE / path).exists() or (page.parent / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_their_names_exist(page: Path) -> None:
    """`clip_batch.folder.module`, and a name in it."""
    for name in re.findall(r"(?<![\w/.-])clip_batch(?:\.(?!json\b)[A-Za-z_]\w*)+", page.read_text()):
        module = name
        while module not in FILES:
            module = module.rpartition(".")[0]
        inside = name.removeprefix(module).removeprefix(".").partition(".")[0]
        assert not inside or re.search(rf"\b{inside}\b", FILES[module].read_text()), name


@pytest.mark.parametrize("job", sorted(ROOT.glob("jobs/*.py")), ids=lambda job: job.name)
def test_jobs_run(job: Path) -> None:
    done = subprocess.run([sys.executable, str(job), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "usage: clip-batch" in done.stdout
