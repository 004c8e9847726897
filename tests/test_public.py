"""The public names of `clip_batch`, and the errors that its callers can catch."""

from __future__ import annotations

import ast
import errno
import importlib
import pickle

import pytest

from clip_batch import errors
from clip_batch.errors import ClipBatchError, DecodeError, Preempted, ServiceError, StorageUnavailable
from clip_batch.storage import retry
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
