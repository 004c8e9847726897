"""Texts of the shell mean what was typed, whatever the terminal's encoding; what is no text is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from clip_batch import ConfigError
from clip_batch.config.texts import query_text, shell_text

SHELL = "import sys; from clip_batch.config.texts import shell_text; print(ascii(shell_text(sys.argv[1], '--text')))"


def in_ascii(word: bytes) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return subprocess.run([sys.executable, "-c", SHELL, word], env=environment, capture_output=True, text=True)


def test_utf8_is_taken_where_the_terminal_has_ascii() -> None:
    assert in_ascii("猫".encode()).stdout == f"{'猫'!a}\n"


def test_other_bytes_are_refused_with_the_remedy() -> None:
    assert "set LANG=C.UTF-8" in in_ascii(b"caf\xe9").stderr


def test_text_is_taken_as_it_is() -> None:
    assert shell_text("a 猫", "--text") == query_text("a 猫", "--text") == "a 猫"


@pytest.mark.parametrize(
    ("value", "reason"), [("", "empty"), (" ", "blank"), ("\ud83d", "no Unicode"), (5, "one text")]
)
def test_what_is_no_text_is_refused(value: object, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^--text is .*{reason}"):
        query_text(value, "--text")
