"""On a terminal each command says something before it loads a large library, which takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from clip_batch.cli import COMMANDS
from clip_batch.config import PlanConfig
from clip_batch.config.extras import NEEDS
from clip_batch.plan.plan import make_plan
from tests import ROOT, corpus
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


QUICK = [
    "--help",
    "merge --help",
    "models cached",
    "status --output {out}",
    "status --output nowhere",
    "gc --output nowhere",
    "embed --output nowhere",
    "plan --output out --input nowhere",
    "plan --output out",
]
"""Commands that answer, or refuse, without loading what takes a tenth of a second or more."""

SLOW = {*HEAVY, "numpy", "pyarrow", "pydantic", "http.client", "importlib.metadata", "rich"}

MODULES = """
import sys
from clip_batch.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("\\n", *sorted({slow} & {{*sys.modules}}))
"""


@pytest.mark.parametrize("words", QUICK)
def test_what_answers_at_once_loads_little(words: str, out: Path, tmp_path: Path) -> None:
    # -S: the environment's own start-up files load modules too
    paths = [str(ROOT), *(path for path in sys.path if path.endswith("-packages"))]
    script = f"import sys; sys.path += {paths}" + MODULES.format(slow=SLOW)
    command = [sys.executable, "-S", "-c", script, *words.format(out=out).split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.splitlines()[-1].split() == [], done.stderr


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OUT whose plan has nothing committed."""
    home = tmp_path_factory.mktemp("first_paint")
    corpus.good_tar(str(home / "a.tar"), 3)
    make_plan(home / "a.tar", home / "out", PlanConfig(model="fake:8"))
    return home / "out"
