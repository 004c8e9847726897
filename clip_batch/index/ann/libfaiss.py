"""faiss, loaded once with the kernels that fit the CPU, and its errors as one line."""

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

    The OpenBLAS inside faiss's wheel may take a new CPU for a very old one (5 times slower). The
    value comes from the CPU's own flags: forcing a kernel that it lacks would be an illegal instruction.
    """
    flags = set(re.findall(r"\S+", (re.findall(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE) or [""])[0]))
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"} <= flags:
        return "SkylakeX"
    if {"avx2", "fma"} <= flags:
        return "Zen" if "AuthenticAMD" in cpuinfo else "Haswell"
    return None


@functools.cache
def load() -> Any:
    """The module faiss."""
    if platform.system() == "Linux" and platform.machine() == "x86_64" and "OPENBLAS_CORETYPE" not in os.environ:
        with open("/proc/cpuinfo") as file:
            if core := openblas_core(file.read()):
                os.environ["OPENBLAS_CORETYPE"] = core  # read once, when the library is loaded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SWIG's types and numpy's moved names: not ours to mend
        import faiss
    return faiss


def make(key: str, dim: int) -> Index:
    """An untrained index of a key, for inner products. ConfigError: faiss does not know the key."""
    with key_errors(f"index key {key!r} for vectors of {dim}"):
        return load().index_factory(dim, key, load().METRIC_INNER_PRODUCT)


def inner(index: Index) -> Index | None:
    """What a transform, an id map or a re-ranking index wraps; None where it is none of these."""
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
    """faiss's exceptions, with their C++ signatures, as one line: what it says of a key is the user's to mend."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^.*? at \S+?:\d+: (Error: )?", "", one_line(error))
        raise ConfigError(f"{what}: {reason}; mend --index-key (or leave it auto)") from None
