"""What commands print where the terminal, or a log, cannot encode it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clip_batch.cli import main
from clip_batch.cli.arguments import to_json
from tests import corpus

CAPTION = "火 🔥 Äpfel"

CODES = ("cp1252", "utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT and INDEX of three pictures, below a folder whose name is not ASCII; one picture is broken."""
    home = tmp_path_factory.mktemp("encodings") / "Ordner 火"
    home.mkdir()
    files = [("ä.jpg", corpus.jpeg()), ("ä.txt", CAPTION.encode()), ("ä.json", b'{"width": NaN}')]
    corpus.write_tar(f"{home}/a.tar", [*files, ("b.jpg", corpus.jpeg(2)), ("c火.jpg", b"<html>")])
    assert main(["plan", "--input", f"{home}/a.tar", "--output", f"{home}/out", "--model", "fake:8"]) == 0
    assert main(["embed", "--output", f"{home}/out", "--device", "cpu", "--no-progress"]) == 0
    assert main(["merge", "--output", f"{home}/out", "--index", f"{home}/index"]) == 0
    return home


def run(encoding: str, *words: str) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run([sys.executable, "-m", "clip_batch", *words], env=env, capture_output=True)


@pytest.mark.parametrize("encoding", ["ascii", *(pytest.param(name, marks=pytest.mark.slow) for name in CODES)])
def test_what_cannot_be_encoded_is_escaped(encoding: str, folder: Path) -> None:
    search = ["search", "--index", f"{folder}/index", "--text", CAPTION, "-k", "2"]
    shown = run(encoding, *search)
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert ("火 🔥 Äpfel" if encoding == "utf-8" else "\\u706b \\U0001f525") in shown.stdout.decode(encoding)
    told = run(encoding, *search, "--json")
    assert (told.returncode, told.stderr) == (0, b"")
    assert CAPTION in [hit["metadata"]["caption"] for hit in json.loads(told.stdout.decode(encoding))]
    wrong = run(encoding, "status", "--output", f"{folder}/nirgends 火\udcff")
    assert wrong.returncode == 2 and b"Traceback" not in wrong.stderr and b"no plan at" in wrong.stderr


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"score": float("nan"), "list": [float("inf"), 1.5, ("a", None)], "name": "caf\udce9"}
    read = json.loads(to_json(value), parse_constant=pytest.fail)
    assert read == {"score": None, "list": [None, 1.5, ["a", None]], "name": "caf\udce9"}
    to_json(value).encode("utf-8")


def test_a_text_that_is_not_unicode_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--index", f"{folder}/index", "--text", "caf\udce9"]) == 2


def test_a_closed_standard_output_is_no_traceback(folder: Path) -> None:
    words = [sys.executable, "-m", "clip_batch", "search", "--index", f"{folder}/index", "--text", "a"]
    told = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *words], capture_output=True)
    assert (told.returncode, told.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--text", ""], "--text is empty"),
        (["--text", "a", "--where", ""], "where is empty"),
        (["--text", "a", "--unique-threshold", "0.9"], "no effect without --unique"),
    ],
)
def test_a_search_that_says_nothing_is_refused(
    words: list[str], reason: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", "--index", f"{folder}/index", *words]) == 2
    assert reason in capsys.readouterr().err
