"""The names of OUT: attempts can be read back from them, and no other module spells them."""

from __future__ import annotations

import ast

import pytest

from clip_batch.plan import paths
from clip_batch.storage.paths import TEMPORARY
from tests.test_layers import FILES


@pytest.mark.parametrize("folder", paths.DATA_FOLDERS)
def test_a_data_file_names_its_attempt(folder: str) -> None:
    name = paths.data_file(folder, "0012", "1a2b3c4d")
    assert name.startswith(f"{folder}/") and name.endswith(".npy" if folder in ("img_emb", "text_emb") else ".parquet")
    base = name.removeprefix(f"{folder}/")
    assert paths.parse_attempt(base) == (12, "1a2b3c4d")
    assert paths.parse_attempt(f".{base}{TEMPORARY}5e6f") == (12, "1a2b3c4d")


def test_names_that_are_fixed() -> None:
    assert paths.data_file("img_emb", "0003", "1a2b3c4d") == "img_emb/img_emb_0003-1a2b3c4d.npy"
    assert paths.commit("0003") == "_clip_batch/commits/0003.json"
    assert paths.failed_attempt("0003", "1a2b") == "_clip_batch/failures/attempts/0003-1a2b.json"
    assert paths.parse_attempt("0003-1a2b.json") == (3, "1a2b")


@pytest.mark.parametrize("name", ["0003.json", "metadata.parquet", "notes-1.txt", ""])
def test_other_files_have_no_attempt(name: str) -> None:
    assert paths.parse_attempt(name) is None


def test_no_other_module_spells_a_name_of_out() -> None:
    spelled = {paths.HOME, *paths.VECTORS.values()}
    for name, path in FILES.items():
        if name == "clip_batch.plan.paths":
            continue
        strings = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        for text in strings:
            first = text.split("/")[0] if isinstance(text, str) else ""
            assert first not in spelled, f"{name} spells {text!r}: see clip_batch/plan/paths.py"
