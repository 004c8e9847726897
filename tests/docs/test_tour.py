"""docs/tour.md names files and what lies in them: all of it exists, and the tour stays short."""

from __future__ import annotations

import ast
import re

import pytest

from tests import ROOT
from tests.test_layers import PACKAGE

TOUR = (ROOT / "docs/tour.md").read_text()
REFERENCES = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", TOUR)))


def test_the_tour_is_short_and_names_code() -> None:
    assert len(TOUR.splitlines()) < 80
    assert len(REFERENCES) > 30


def test_every_path_is_checked() -> None:
    """A path without a name behind it, or of another form, would escape the test below."""
    paths = set(re.findall(r"`([\w/]+\.(?:py|sbatch))(?=[`:])", TOUR)) - {path for path, _ in REFERENCES}
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize(("path", "name"), REFERENCES)
def test_what_the_tour_names_exists(path: str, name: str) -> None:
    """A top-level function or class of the file, or a method as Class.method."""
    body: list[ast.stmt] = ast.parse((PACKAGE / path).read_text()).body
    for part in name.split("."):
        (node,) = [
            node
            for node in body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == part
        ]
        body = node.body
