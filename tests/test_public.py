"""The public names of `clip_batch`, and the errors that its callers can catch."""

from __future__ import annotations

import ast
import dataclasses
import errno
import importlib
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import clip_batch
from clip_batch import config, errors
from clip_batch.errors import ClipBatchError, DecodeError, Preempted, ServiceError, StorageUnavailable
from clip_batch.storage import retry
from tests.corpus import good_tar
from tests.test_layers import FILES


def exceptions() -> list[type[BaseException]]:
    """All classes of the package that derive from BaseException."""
    bases = {"Exception", *(name for name, value in vars(errors).items() if isinstance(value, type))}
    raised: list[type[BaseException]] = []
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(
                ast.unparse(base).rpartition(".")[2].endswith(("Error", "Exception"))
                or ast.unparse(base).rpartition(".")[2] in bases
                for base in node.bases
            ):
                kind = getattr(importlib.import_module(name), node.name)
                if issubclass(kind, BaseException):
                    raised.append(kind)
    return raised


def test_every_error_derives_from_one_base() -> None:
    kinds = exceptions()
    assert len(kinds) > 15
    assert not [kind for kind in kinds if not kind.__name__.startswith("_") and not issubclass(kind, ClipBatchError)]


@pytest.mark.parametrize(
    "error",
    [
        DecodeError("too_many_pixels", "10 pixels"),
        Preempted(),
        ServiceError("busy", 503),
        StorageUnavailable("reading s3://b/a: busy"),
    ],
)
def test_errors_can_be_pickled(error: ClipBatchError) -> None:
    """They travel between processes: fetch process, Spark's executors, data loaders."""
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_a_store_that_does_not_answer_is_an_oserror_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.0)

    def refuse() -> None:
        raise ConnectionResetError("reset")

    with pytest.raises(StorageUnavailable) as caught:
        retry.call_store(lambda: retry.call_store(refuse, "listing s3://b"), "reading s3://b/a")
    assert isinstance(caught.value, OSError) and str(caught.value).startswith("reading s3://b/a: ")
    full = StorageUnavailable("disk")
    full.errno = errno.ENOSPC
    assert retry.is_transient(StorageUnavailable("busy")) and not retry.is_transient(full)


def test_the_public_names_are_exact() -> None:
    assert clip_batch.__all__ == sorted(set(clip_batch.__all__))
    assert [name for name in dir(clip_batch) if not name.startswith("__")] == sorted(clip_batch.__all__)
    namespace: dict[str, object] = {}
    exec("from clip_batch import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(clip_batch.__all__)
    held = {name for name, value in vars(clip_batch).items() if not isinstance(value, ModuleType)}
    assert {name for name in held if not name.startswith("_")} == set(clip_batch.__all__) - {"errors"}


def test_every_section_and_every_error_is_public() -> None:
    sections = {name for name, value in vars(config).items() if dataclasses.is_dataclass(value)}
    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert sections | raised <= set(clip_batch.__all__)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="public names: AsyncClient, Client"):
        clip_batch.nonsense  # noqa: B018


def test_names_are_loaded_when_they_are_used() -> None:
    script = "import clip_batch, sys; dir(clip_batch); print({'numpy', 'pyarrow', 'pydantic', 'yaml'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["make_plan", "embed", "merge"])
def test_stages_take_paths_first_and_have_defaults(name: str) -> None:
    parameters = inspect.signature(getattr(clip_batch, name)).parameters
    needed = [parameter.name for parameter in parameters.values() if parameter.default is inspect.Parameter.empty]
    assert needed == {"make_plan": ["input", "output"], "embed": ["output"], "merge": ["output", "index"]}[name]
    assert list(parameters)[len(needed)] == "config"
    assert {parameters[name].kind for name in ("storage", "progress")} == {inspect.Parameter.KEYWORD_ONLY}


def test_the_stages_take_path_objects_and_one_input_as_a_str(tmp_path: Path) -> None:
    good_tar(str(tmp_path / "a.tar"), 12)
    lines: list[str] = []
    plan = clip_batch.make_plan(f"{tmp_path}/*.tar", tmp_path / "out", clip_batch.PlanConfig(model="fake:8"))
    assert plan == clip_batch.make_plan([tmp_path / "a.tar"], tmp_path / "out", clip_batch.PlanConfig(model="fake:8"))
    (outcome,) = clip_batch.embed(tmp_path / "out", progress=lines.append)
    assert (outcome.state, outcome.rows) == ("committed", 12)
    assert lines == ["partition 0 committed: 12 samples embedded, 0 listed as failed"]
    manifest = clip_batch.merge(tmp_path / "out", tmp_path / "index", progress=lines.append)
    assert manifest.rows == 12 and len(lines) > 1
