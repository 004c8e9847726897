"""The command line itself: usage, version, and a reader that leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import clip_batch
from clip_batch.cli import COMMANDS, main


def test_the_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"  {name} " in usage for name in COMMANDS)
    assert main([]) == 2 and capsys.readouterr().out == usage


@pytest.mark.parametrize("name", ["export", "submit"])
def test_the_first_word_of_some_commands_has_help_too(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    usage = capsys.readouterr().out
    assert all((f"  {command} " in usage) == command.startswith(f"{name} ") for command in COMMANDS)
    assert main([name]) == 2
    assert "say which" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"clip-batch {clip_batch.__version__}\n"


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nonsense"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("clip-batch nonsense: no such command; the commands are run, demo, plan")


def test_ctrl_c_ends_each_command_with_75(tmp_path: Path) -> None:
    """At any moment; here the command waits for its configuration, which a pipe never gives it."""
    pipe = tmp_path / "options.yaml"
    os.mkfifo(pipe)
    words = [sys.executable, "-m", "clip_batch", "status", "--output", "out", "--config", str(pipe)]
    started = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    with pipe.open("w"):  # once the command has opened it too
        started.send_signal(signal.SIGINT)
        told = started.communicate(timeout=60)[1]
    assert started.returncode == 75, told
    assert told == "clip-batch status: stopped by a signal; what is committed stays, run the same command again\n"


@pytest.mark.parametrize("arguments", [["--help"], ["versions", "--help"]])
def test_a_reader_may_leave(arguments: list[str]) -> None:
    script = f"import sys; from clip_batch.cli import main; input(); sys.exit(main({arguments}))"
    started = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdin and started.stdout and started.stderr
    started.stdout.close()
    started.stdin.write("\n")
    started.stdin.close()
    said = started.stderr.read()
    started.stderr.close()
    assert (started.wait(60), said) == (0, "")
