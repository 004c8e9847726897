"""docs/migrating.md has everything of clip-retrieval, names only commands and flags that exist, and its code runs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clip_batch.cli import COMMANDS, main
from clip_batch.demo import data
from clip_batch.search.heads import load_head
from tests import ROOT

PAGE = ROOT / "docs/migrating.md"
SECTIONS = dict(re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^## |^### |\Z)", PAGE.read_text(), re.S | re.M))
"""Heading -> text; sections of level three are not part of those of level two."""


def python_of_clip_retrieval() -> str:
    python = os.environ.get("CLIP_RETRIEVAL_PYTHON") or str(ROOT / ".clip-retrieval/bin/python")
    if not Path(python).exists():
        pytest.skip("clip-retrieval is not installed: make clip-retrieval, or set CLIP_RETRIEVAL_PYTHON")
    return python


@pytest.fixture(scope="module")
def source() -> dict[str, ast.Module]:
    """clip-retrieval's modules by name, parsed; importing them takes tens of seconds."""
    (folder,) = Path(python_of_clip_retrieval()).parent.parent.glob("lib/python3*/site-packages/clip_retrieval")
    return {
        ".".join(["clip_retrieval", *path.relative_to(folder).with_suffix("").parts]): ast.parse(path.read_text())
        for path in folder.rglob("*.py")
    }


def parameters(module: ast.AST, name: str) -> list[str]:
    (function,) = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.name == name]
    return [argument.arg for argument in function.args.args if argument.arg != "self"]


def commands(source: dict[str, ast.Module]) -> Iterator[tuple[str, list[str]]]:
    """Yield clip-retrieval's commands with their flags, which are the parameters of the functions in its table."""
    table = source["clip_retrieval.cli"]
    homes = {
        alias.name: node.module
        for node in ast.walk(table)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    (listed,) = [node for node in ast.walk(table) if isinstance(node, ast.Dict)]
    for key, value in zip(listed.keys, listed.values, strict=True):
        assert isinstance(key, ast.Constant) and isinstance(value, ast.Name)
        home, name = homes[value.id], value.id
        if name == "clip_inference":  # imported under another name
            home, name = "clip_retrieval.clip_inference.main", "main"
        yield key.value, parameters(source[home], name)


def strings(module: ast.AST, pattern: type[ast.expr], name: str) -> set[str]:
    """Return the constants of `name["..."]` (a Subscript), or the first arguments of calls of `...name("...")`."""
    nodes: set[ast.expr] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Subscript) and pattern is ast.Subscript and ast.unparse(node.value) == name:
            nodes.add(node.slice)
        elif isinstance(node, ast.Call) and pattern is ast.Call and ast.unparse(node.func).endswith(name):
            nodes |= set(node.args)
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_each_command_and_flag_is_there(source: dict[str, ast.Module]) -> None:
    known = dict(commands(source))
    assert {"inference", "index", "back", "filter", "front", "end2end", "inference.worker"} <= known.keys()
    for command, flags in known.items():
        assert f"`{command}`" in PAGE.read_text()
        left = "".join(line.split(" | ")[0] for line in SECTIONS[command].splitlines() if line.startswith("| `"))
        assert set(flags) - set(re.findall(r"`--(\w+)`", left)) == set(), command


def test_each_endpoint_and_field_is_there(source: dict[str, ast.Module]) -> None:
    back, front = source["clip_retrieval.clip_back"], source["clip_retrieval.clip_front"]
    paths = strings(back, ast.Call, "api.add_resource") | strings(front, ast.Call, "app.route") | {"/metrics"}
    assert len(paths) == 8
    fields = strings(back, ast.Subscript, "json_data") | strings(back, ast.Call, "json_data.get")
    assert len(fields) > 14
    text = SECTIONS["Endpoints"]
    assert {path for path in paths if not re.search(rf"`(GET |POST )?{re.escape(path)}`", text)} == set()
    assert {field for field in fields - {""} if f"`{field}`" not in text} == set()


def test_each_field_of_its_file_of_indices_is_there(source: dict[str, ast.Module]) -> None:
    (options,) = [node for node in ast.walk(source["clip_retrieval.clip_back"])
                  if isinstance(node, ast.ClassDef) and node.name == "ClipOptions"]  # fmt: skip
    fields = [ast.unparse(node.target) for node in options.body if isinstance(node, ast.AnnAssign)]
    assert len(fields) > 10
    assert [field for field in fields if not re.search(rf"`(--)?{field}`", SECTIONS["back"])] == []


def test_its_client_is_there(source: dict[str, ast.Module]) -> None:
    client = source["clip_retrieval.clip_client"]
    asked = [f"query({name}=)" for name in parameters(client, "query")]
    assert [n for n in [*parameters(client, "__init__"), *asked] if f"`{n}`" not in SECTIONS["ClipClient"]] == []


def test_its_environment_is_there(source: dict[str, ast.Module]) -> None:
    read = {name for module in source.values() for name in strings(module, ast.Subscript, "os.environ")}
    assert "VIRTUAL_ENV" in read
    assert {name for name in read if f"`{name}`" not in PAGE.read_text()} == {"CUDA_VISIBLE_DEVICES"}  # the same here


@pytest.mark.parametrize("section", [name for name in SECTIONS if "| there | here |" in SECTIONS[name]])
def test_our_flags_exist(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each flag in the right-hand columns belongs to a command that the section names."""
    text = SECTIONS[section]
    named = set(re.findall(r"clip-batch ((?:submit |export )?[a-z0-9-]+)", text))
    for command in named & COMMANDS.keys():
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", capsys.readouterr().out))
    for line in text.splitlines():
        here = line.split(" | ", 1)[-1] if line.startswith("|") else ""
        assert set(re.findall(r"`(--?[a-z0-9-]+)", here)) - known == set(), section


@pytest.mark.slow
def test_the_lines_of_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data.write_tars("tars", 1)
    (code,) = re.findall(r"\n\n((?:    [^\n]*\n|\n)+)", SECTIONS["In Python and notebooks"])
    names: dict[str, object] = {}
    exec(textwrap.dedent(code), names)
    hits = names["hits"]
    assert isinstance(hits, list) and len(hits) == 5
    assert "red apple" in hits[0].metadata["caption"]


H14 = """
import importlib.util, sys
sys.path[:0] = importlib.util.find_spec("clip_retrieval").submodule_search_locations
import numpy, torch
from h14_nsfw_model import H14_NSFW_Detector as Detector
stored, Detector.load_state = Detector.load_state, lambda self, folder: self.state_dict()
torch.manual_seed(0)
torch.save(Detector().state_dict(), "h14_nsfw_model/model.pt")
Detector.load_state = stored
rows = numpy.random.default_rng(0).standard_normal((100, 1024)).astype("float32")
numpy.savez("judged.npz", rows=rows, values=Detector(cache_folder=".").predict(rows, 100)[:, 0])
"""
"""clip-retrieval's detector with random weights, as `back` loads it from its cache; importing the package itself would
take a minute."""


@pytest.mark.slow
def test_the_h14_head_judges_as_theirs_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("h14_nsfw_model").mkdir()
    done = subprocess.run([python_of_clip_retrieval(), "-c", H14], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    Path("h14_nsfw_model/model.pt").rename("h14_nsfw.pth")
    (spec,) = re.findall(r"--safety-head '([^']+)'", SECTIONS["back"])
    judged = np.load("judged.npz")
    assert np.std(judged["values"]) > 1e-3
    assert np.allclose(load_head(spec, "sigmoid")(judged["rows"]), judged["values"], atol=1e-5)
    assert not np.allclose(
        load_head("h14_nsfw.pth#output=linear", "sigmoid")(judged["rows"]), judged["values"], atol=1e-5
    )


def test_the_violence_head_judges_as_theirs_does(tmp_path: Path) -> None:
    """The larger of the two products decides, as in `get_violent_items`."""
    random = np.random.default_rng(0)
    prompts, rows = random.standard_normal((2, 16)).astype("f4"), random.standard_normal((200, 16)).astype("f4")
    np.save(tmp_path / "violence.npy", prompts)
    judged = load_head(str(tmp_path / "violence.npy"), "sigmoid")(rows) > 0.5
    assert np.array_equal(judged, np.argmax(rows @ prompts.T, axis=1) == 1)
