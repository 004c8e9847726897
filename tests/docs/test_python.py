"""The examples of docs/python.md run, one after another, with pictures and a service."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from clip_batch.demo import data
from tests import ROOT
from tests.servers.serving import running

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
OPTIONAL = ("duckdb", "polars")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("python")
    (home / "pictures").mkdir()
    number = 0
    with tarfile.open(data.write_tars(str(home / "tars"), shards=20)[0]) as tar:
        for member in tar:
            if member.name.endswith(".jpg") and number < 40:
                file = tar.extractfile(member)
                assert file is not None
                (home / "pictures" / f"{number}.jpg").write_bytes(file.read())
                number += 1
    assert number == 40
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        yield home


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """The variables that the examples share."""
    return {}


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_examples(number: int, home: Path, names: dict[str, Any]) -> None:
    code = BLOCKS[number]
    assert len(code.strip().splitlines()) <= 7, "five lines, and an import"
    if missing := [library for library in OPTIONAL if library in code and not find_spec(library)]:
        pytest.skip(f"{missing[0]} is not installed")
    if "http://127.0.0.1:1234" in code:
        with running({"numbers": str(home / "index")}) as url:
            exec(code.replace("http://127.0.0.1:1234", url), names)
    else:
        exec(code, names)


def test_they_are_all_there() -> None:
    text = "".join(BLOCKS)
    functions = (
        "embed_table",
        "read",
        "merge",
        "filter",
        "remove",
        "versions",
        "verify",
        "sweep",
        "make_app",
        "status",
    )
    for name in ("Encoder", "Client", *functions):
        assert f"clip_batch.{name}(" in text, name
