"""Loads faiss once, with kernels that fit the CPU; makes and unwraps indices; turns faiss's errors into one line."""

from __future__ import annotations

import functools
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from clip_batch.errors import ConfigError, one_line

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.int64]

Index = Any
"""A faiss index (faiss has no type stubs)."""


def openblas_core(cpuinfo: str) -> str | None:
    """OpenBLAS's name for the CPU that /proc/cpuinfo describes; None to leave it to OpenBLAS.

    The OpenBLAS inside faiss's wheel may take a new CPU for a very old one and be 5 times slower. The name follows from
    the CPU's own flags: a kernel for instructions that the CPU lacks would crash.
    """
    flags = set(re.findall(r"\S+", (re.findall(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE) or [""])[0]))
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"} <= flags:
        return "SkylakeX"
    if {"avx2", "fma"} <= flags:
        return "Zen" if "AuthenticAMD" in cpuinfo else "Haswell"
    return None


@functools.cache
def load() -> Any:
    """Import faiss and return the module.

    Its threads sleep while they wait for each other: as they are by default they spin, and on a machine where others
    work too a search of 0.3 CPU seconds takes 0.8.
    """
    wanted = {"OMP_WAIT_POLICY": "PASSIVE"}
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        with open("/proc/cpuinfo") as file:
            if core := openblas_core(file.read()):
                wanted["OPENBLAS_CORETYPE"] = core
    with _environment(wanted), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about SWIG's types and numpy's renamed modules
        import faiss
    return faiss


@contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """Set variables that are not set, for libraries that read them when they are loaded."""
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def make(index_key: str, dim: int) -> Index:
    """An untrained index for inner products. ConfigError: faiss does not know the index key."""
    with key_errors(f"index key {index_key!r} for vectors of {dim}"):
        return load().index_factory(dim, index_key, load().METRIC_INNER_PRODUCT)


def inner(index: Index) -> Index | None:
    """The index that a transform, an id map or a re-ranking index wraps; None for any other index."""
    faiss = load()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return index.base_index
    return index.index if isinstance(index, (faiss.IndexPreTransform, faiss.IndexIDMap)) else None


def innermost(index: Index) -> Index:
    """The index inside all wrappers."""
    while (within := inner(index)) is not None:
        index = within
    return load().downcast_index(index)


@contextmanager
def key_errors(what: str) -> Iterator[None]:
    """Raise ConfigError, one line without C++ signatures, where faiss refuses an index key."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^.*? at \S+?:\d+: (Error: )?", "", one_line(error))
        raise ConfigError(f"{what}: {reason}; change --index-key (or leave it auto)") from None
