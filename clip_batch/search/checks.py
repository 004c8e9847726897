"""Checks of what a caller asks of an index; each raises ConfigError that names what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clip_batch.errors import ConfigError
from clip_batch.index import removed_rows
from clip_batch.index.manifest import Manifest
from clip_batch.search.rows import Ids, Vectors


def checked_search(manifest: Manifest, queries: npt.ArrayLike, k: int, modality: str, effort: int | None) -> Vectors:
    """Queries float32 (n, d) of a search that an index of this manifest can do. ConfigError: a wrong argument."""
    try:
        wanted = np.ascontiguousarray(np.atleast_2d(np.asarray(queries)), dtype=np.float32)
    except (TypeError, ValueError):
        raise ConfigError("queries are not an array of numbers") from None
    if wanted.ndim != 2 or wanted.shape[1] != manifest.dim:
        raise ConfigError(f"queries have shape {wanted.shape}: this index wants (n, {manifest.dim})")
    if not np.isfinite(wanted).all():
        raise ConfigError("queries contain NaN or infinity")
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ConfigError(f"k is {k!r}: it must be 1 or more")
    if effort is not None and effort < 1:
        raise ConfigError(f"effort is {effort}: it must be 1 or more")
    check_modality(manifest, modality)
    return wanted


def check_modality(manifest: Manifest, modality: str) -> None:
    """ConfigError: an index of this manifest has not got it."""
    if modality not in manifest.key:
        raise ConfigError(f"modality {modality!r} is not in this index: it has {', '.join(manifest.key)}")


def check_columns(schema: pa.Schema, columns: Sequence[str]) -> None:
    """ConfigError: metadata of this schema has not got one."""
    if unknown := [name for name in columns if name not in schema.names]:
        raise ConfigError(f"no metadata column {', '.join(unknown)}: there are {', '.join(schema.names)}")


def checked_ids(manifest: Manifest, removed: Ids, ids: npt.ArrayLike) -> Ids:
    """Ids int64 (n,). ConfigError: one is not of the index, or was removed."""
    wanted = np.asarray(ids).reshape(-1)
    if not len(wanted):
        return np.empty(0, dtype=np.int64)
    if wanted.dtype.kind not in "iu" or wanted.min() < 0 or wanted.max() >= manifest.rows:
        raise ConfigError(f"ids are whole numbers from 0 to {manifest.rows - 1}")
    if (gone := removed_rows.contains(removed, wanted)).any():
        raise ConfigError(f"row {wanted[gone][0]} was removed from this index")
    return wanted.astype(np.int64)
