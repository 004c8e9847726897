"""Checks of the arguments of a search; each raises a ConfigError that names what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clip_batch.errors import ConfigError
from clip_batch.index import removed_rows
from clip_batch.index.manifest import Manifest
from clip_batch.search.rows import Ids, Vectors


def checked_search(manifest: Manifest, queries: npt.ArrayLike, k: int, modality: str, effort: int | None) -> Vectors:
    """Check the arguments of a search, and return its queries as float32 (n, d). ConfigError: an argument is wrong."""
    try:
        with np.errstate(over="ignore"):
            array = np.atleast_2d(np.asarray(queries))
            if array.dtype.kind not in "iufO":  # complex numbers would lose a part
                raise TypeError
            vectors = np.ascontiguousarray(array, dtype=np.float32)
    except (TypeError, ValueError):
        raise ConfigError("queries are not an array of real numbers: give float (n, d)") from None
    if vectors.ndim != 2 or vectors.shape[1] != manifest.dim:
        raise ConfigError(f"queries have shape {vectors.shape}: this index needs (n, {manifest.dim})")
    if not np.isfinite(vectors).all():
        raise ConfigError("queries contain NaN or infinity")
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ConfigError(f"k is {k!r}: it must be 1 or more")
    if effort is not None and (isinstance(effort, bool) or not isinstance(effort, (int, np.integer)) or effort < 1):
        raise ConfigError(f"effort is {effort!r}: it must be 1 or more")
    check_modality(manifest, modality)
    return vectors


def modality_in(manifest: Manifest, modality: str) -> str:
    """The modality of an index that is searched: "image", the default, means captions where the index has these alone.

    Any other modality is returned as it is, also where the index lacks it.
    """
    return "text" if modality == "image" and tuple(manifest.key) == ("text",) else modality


def check_modality(manifest: Manifest, modality: str) -> None:
    """Raise ConfigError if the index lacks a modality."""
    if not isinstance(modality, str) or modality_in(manifest, modality) not in manifest.key:
        raise ConfigError(f"modality {modality!r} is not in this index: it has {', '.join(manifest.key)}")


def check_columns(schema: pa.Schema, columns: Sequence[str]) -> None:
    """Raise ConfigError if the metadata schema lacks a column, or `columns` is one text in place of a list."""
    if isinstance(columns, str) or not isinstance(columns, Iterable):
        raise ConfigError(f"columns is {columns!r}: it must be a list of names")
    if unknown := [str(name) for name in columns if name not in schema.names]:
        raise ConfigError(f"no metadata column {', '.join(unknown)}: there are {', '.join(schema.names)}")


def checked_ids(manifest: Manifest, removed: Ids, ids: npt.ArrayLike) -> Ids:
    """Return ids as int64 (n,). ConfigError: one is not in the index, or was removed."""
    row_ids = np.asarray(ids).reshape(-1)
    if not len(row_ids):
        return np.empty(0, dtype=np.int64)
    if row_ids.dtype.kind not in "iu" or row_ids.min() < 0 or row_ids.max() >= manifest.rows:
        raise ConfigError(f"ids are whole numbers from 0 to {manifest.rows - 1}")
    if (is_removed := removed_rows.contains(removed, row_ids)).any():
        raise ConfigError(f"row {row_ids[is_removed][0]} was removed from this index")
    return row_ids.astype(np.int64)
