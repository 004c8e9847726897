"""On a terminal each command says something before it loads a large library, which takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from clip_batch.cli import COMMANDS
from clip_batch.config.extras import NEEDS
from tests.test_layers import HEAVY

WORDS = {
    "run": ["pictures", "--output", "out"],
    "demo": ["demo"],
    "end2end": ["--urls", "list.csv", "--output", "out"],
    "prefetch": ["--model", "demo"],
    "search": ["--index", "index", "--id", "1"],
    "filter": ["--index", "index", "--id", "1", "--output", "rows"],
    "serve": ["--index", "index"],
    "serve-worker": ["--allow", "folder"],
    "worker": ["--output", "out", "--partitions", "0"],
    "merge": ["--output", "out", "--index", "index"],
    "export clip-retrieval": ["--index", "index", "--to", "folder"],
    "export sql": ["--index", "index", "--sql", "sqlite:///rows.db"],
    "export milvus": ["--index", "index", "--milvus", "rows.db"],
    "export onnx": ["--model", "demo", "--to", "folder"],
}
"""What each command is given; the others, --output."""

SCRIPT = """
import io, os, sys
from clip_batch.cli import main

class Terminal(io.StringIO):
    def isatty(self):
        return True

    def write(self, text):
        print(command, "-", *sorted({heavy} & {{*sys.modules}}), "-", text.strip(), flush=True)
        os._exit(0)

for command, words in {words}.items():
    if not os.fork():
        sys.stderr = Terminal()
        main([*command.split(), *words])
        print(command, "- nothing", flush=True)
        os._exit(1)
    os.wait()
"""


def test_each_command_says_something_before_it_loads_a_large_library(tmp_path: Path) -> None:
    assert NEEDS.keys() <= COMMANDS.keys()
    words = {command: WORDS.get(command, ["--output", "out"]) for command in NEEDS}
    script = SCRIPT.format(heavy={*HEAVY}, words=words)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    lines = done.stdout.splitlines()
    expected = [f"{command} - - clip-batch {command}: its libraries are being loaded" for command in NEEDS]
    assert lines == expected, done.stderr
