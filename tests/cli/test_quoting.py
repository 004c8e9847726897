"""Commands that are printed can be pasted: each path in them is quoted for the shell."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from clip_batch.cli import main
from tests import corpus
from tests.test_layers import FILES

FLAG = re.compile(r"--(output|index|input|urls|image|text) $")


def test_every_path_in_a_printed_command_is_quoted() -> None:
    """Of each f-string that names a command, what follows a flag of paths is a call of quote."""
    seen, bare = 0, []
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.JoinedStr) or "clip-batch " not in ast.unparse(node):
                continue
            for before, value in zip(node.values, node.values[1:], strict=False):
                flag = isinstance(before, ast.Constant) and FLAG.search(str(before.value))
                if flag and isinstance(value, ast.FormattedValue):
                    seen += 1
                    call = value.value
                    if not (isinstance(call, ast.Call) and ast.unparse(call.func) in ("quote", "shlex.quote")):
                        bare.append(f"{name}:{value.lineno}")
    assert bare == [] and seen > 20


def test_the_commands_of_run_are_pasted_with_spaces_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Ann's pictures").mkdir()
    (tmp_path / "Ann's pictures" / "1.jpg").write_bytes(corpus.jpeg(1))
    assert main(["run", "Ann's pictures", "--no-serve", "--no-progress", "--device", "cpu", "--model", "fake:8"]) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("search: "))
    words = shlex.split(command.removeprefix("search: "))
    assert words[1:4] == ["search", "--index", "clip-batch-Ann's pictures/index"]
    assert main(["status", "--output", "no plan"]) == 2
    assert "--output '" in capsys.readouterr().err
