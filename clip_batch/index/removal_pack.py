"""The ids that many removal lists remove from a version, in one file: thousands of small ones take seconds to read."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

MANY = 64
"""Lists of which the ids are packed: fewer have a file each."""


def pack(ids: Mapping[str, Ids]) -> bytes:
    """A file of the sorted ids (n,) of each list, by digest."""
    buffer = io.BytesIO()
    sizes = np.array([len(of_list) for of_list in ids.values()], dtype=np.int64)
    flat = np.concatenate([np.empty(0, dtype=np.int64), *ids.values()])
    np.savez(buffer, digests=np.array(list(ids), dtype="S16"), sizes=sizes, ids=flat)
    return buffer.getvalue()


def unpack(data: bytes, rows: int) -> dict[str, Ids]:
    """The content of such a file; ValueError if it is none, or not of a version of `rows` rows."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            digests, sizes, ids = (file[name] for name in ("digests", "sizes", "ids"))
    except (OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"not packed ids: {error}") from None
    if digests.dtype != np.dtype("S16") or {sizes.dtype, ids.dtype} != {np.dtype(np.int64)}:
        raise ValueError("not packed ids")
    ends = np.cumsum(sizes)
    if digests.shape != sizes.shape or np.any(sizes < 0) or (ends[-1] if len(ends) else 0) != len(ids):
        raise ValueError("not packed ids")
    unsorted = np.flatnonzero(np.diff(ids) <= 0) + 1
    if not np.isin(unsorted, ends).all() or (len(ids) and (ids.min() < 0 or ids.max() >= rows)):
        raise ValueError("not sorted ids of this version")
    names = [digest.decode("ascii", "replace") for digest in digests.tolist()]
    return dict(zip(names, np.split(ids, ends[:-1]), strict=True)) if names else {}
