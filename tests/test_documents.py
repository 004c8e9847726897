"""What the documents name exists: commands, flags, files; and the jobs run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from clip_batch.cli import COMMANDS, main
from clip_batch.documents import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_flags_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text().replace("\\\n", " ")
    for command, rest in re.findall(r"clip-batch +([a-z0-9]+)((?: +[^\n`]*)?)", text):
        if command not in COMMANDS:
            assert not rest.strip().startswith("--"), f"no command {command}"
            continue
        with pytest.raises(SystemExit):
            main([command, "--help"])
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


def test_embed_plans_first_and_several_workers_share(tmp_path: Path) -> None:
    from tests import corpus

    for number in range(4):
        corpus.good_tar(str(tmp_path / f"{number:03d}.tar"), 30, seed=number)
    out = tmp_path / "out"
    arguments = ["embed", "--input", f"{tmp_path}/{{000..003}}.tar", "--model", "fake:8", "--partition-samples", "30"]
    command = [sys.executable, "-m", "clip_batch", *arguments, "--output", str(out), "--workers", "2"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "4/4 partitions" in done.stderr or "0/0 partitions" in done.stderr
    assert len(list((out / "img_emb").iterdir())) == 4
    assert main(["verify", "--output", str(out), "--deep"]) == 0
    again = [*command[:-2], "--model", "fake:9"]
    refused = subprocess.run(again, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "fake:8" in refused.stderr
    assert "fake:9" in refused.stderr
