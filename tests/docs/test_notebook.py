"""The notebook in docs/ runs from its first cell to its last, and prints what its texts promise."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests import ROOT

nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")

NOTEBOOK = ROOT / "docs" / "getting_started.ipynb"


def test_it_is_kept_without_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # libraries of the kernel warn
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    for name, value in (("PATH", folders), ("TMPDIR", str(tmp_path)), ("IPYTHONDIR", str(tmp_path / "ipython"))):
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute(cwd=tmp_path)
    pieces = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(piece["text"] for piece in pieces if piece.output_type == "stream" and piece.name == "stdout")
    shown = ["".join(piece["data"].get("text/html", "")) for piece in pieces if "data" in piece]
    assert re.search(r"^(\d+) pictures$", text, re.M) and "index key Flat" in text
    assert "20 rows and 20 pictures: ['filter.json', 'images', 'rows']" in text
    assert "1 row removed" in text and "complete: True" in text
    assert sum(html.count("<img ") == 8 for html in shown) == 4, "hits are shown as pictures, the service's too"
    assert any("<th style='text-align:left'>partitions</th>" in html for html in shown), "the status is a table"
    assert not [piece for piece in pieces if piece.output_type == "error"]
