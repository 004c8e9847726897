"""What the documents name exists: commands, flags, files; and the jobs run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from clip_batch.cli import COMMANDS, main
from tests import ROOT

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


@pytest.mark.parametrize("job", sorted(ROOT.glob("jobs/*.py")), ids=lambda job: job.name)
def test_jobs_run(job: Path) -> None:
    done = subprocess.run([sys.executable, str(job), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "usage: clip-batch" in done.stdout
