"""Samples of each shard before it is read: from img2dataset's side-cars, or by a scan of the headers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from clip_batch.errors import InputError
from clip_batch.plan.specs import SIDE_CARS, TAR_SUFFIXES, Options, threaded
from clip_batch.samples.files import list_samples
from clip_batch.storage.paths import is_local
from clip_batch.storage.store import Store
from clip_batch.types import Shard

CHEAP_COUNTS = 100_000
"""Up to this many local tars, side-cars are read though no one asked for counts (20 us each)."""


def count_tars(shards: Sequence[Shard], options: Options, scan: Callable[[Shard], int | None]) -> list[Shard]:
    """The shards with `samples` from img2dataset's side-cars, else from `scan`."""

    def count(shard: Shard) -> Shard:
        samples = _side_car(shard.url, options)
        return replace(shard, samples=scan(shard) if samples is None else samples)

    return list(threaded(count, shards))


def count_folder(folder: Shard, images: Sequence[str], captions: Sequence[str], options: Options) -> Shard:
    """A folder with its number of samples, and a version made of their names."""
    found = list_samples(folder.url, tuple(images), tuple(captions), options)
    if not found:
        raise InputError(f"{folder.url} holds no sample with extensions {' '.join(images)}: name another folder")
    return replace(folder, samples=len(found), etag=hashlib.sha256(repr(found).encode()).hexdigest()[:16])


def _side_car(url: str, options: Options) -> int | None:
    """Successes of NAME_stats.json, else the rows of NAME.parquet whose status is success, else None."""
    folder, _, name = url.rpartition("/")
    suffix = next((suffix for suffix in reversed(TAR_SUFFIXES) if name.endswith(suffix)), "")
    stem = name.removesuffix(suffix)
    store = Store(folder or "/", options)
    try:
        count = json.loads(store.read(stem + SIDE_CARS[0]))["successes"]
        return count if isinstance(count, int) else None
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        with store.open(stem + SIDE_CARS[1]) as file:
            return _count_rows(file)
    except (OSError, ValueError):  # pyarrow's errors are ValueErrors
        return None


def _count_rows(file: Any) -> int:
    from clip_batch.storage.arrow import ParquetFile

    table = ParquetFile(file)
    if "status" not in table.schema.names:
        return int(table.metadata.num_rows)
    return sum(piece["status"].to_pylist().count("success") for piece in table.pieces(65_536, ["status"]))


def count_samples(tars: list[Shard], needed: bool, options: dict[str, Any]) -> list[Shard]:
    """Counts, if they are needed to pack, or cheap."""
    from clip_batch.samples.tar.scan import scan_tar

    if needed:
        return count_tars(tars, options, lambda tar: scan_tar(tar, options)[1])
    cheap = len(tars) <= CHEAP_COUNTS and all(is_local(tar.url) for tar in tars)
    return count_tars(tars, options, lambda tar: None) if cheap else tars
