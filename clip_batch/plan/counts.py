"""Counts the samples of shards before these are read, from img2dataset's side-cars or the headers of the tars."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from clip_batch.errors import InputError
from clip_batch.plan.kinds import PICTURES
from clip_batch.plan.parquet import count_rows
from clip_batch.plan.specs import SIDE_CARS, Options
from clip_batch.plan.threads import map_in_threads
from clip_batch.samples.files import Folder, listing_digest
from clip_batch.samples.tar.suffixes import tar_stem
from clip_batch.storage.paths import is_local, split_url
from clip_batch.storage.store import Store
from clip_batch.types import UNREADABLE, Plan, Shard, format_counts

CHEAP_COUNTS = 100_000
"""Side-cars of up to this many local tars are read even if no counts are needed: 20 us each."""


def count_samples(tars: list[Shard], needed: bool, draft: Plan, options: Options) -> list[Shard]:
    """The tars with `samples` filled in where it is known; `needed` scans the headers of those without side-cars.

    `draft` says how names make samples. Counts that are not needed are only read where that is cheap, from the
    side-cars of local tars.
    """
    from clip_batch.samples.tar.samples import NameRule
    from clip_batch.samples.tar.scan import scan_tar

    if draft.format == "parquet":
        return list(map_in_threads(lambda file: count_rows(file, options), tars)) if needed or _cheap(tars) else tars
    if needed:
        return count_tars(tars, options, lambda tar: scan_tar(tar, NameRule.of(draft), options)[1])
    return count_tars(tars, options, lambda tar: None) if _cheap(tars) else tars


def _cheap(shards: Sequence[Shard]) -> bool:
    return len(shards) <= CHEAP_COUNTS and all(is_local(shard.url) for shard in shards)


def count_tars(tars: Sequence[Shard], options: Options, scan: Callable[[Shard], int | None]) -> list[Shard]:
    """The tars with `samples` from img2dataset's side-cars, or from `scan` where there are none."""

    def count(tar: Shard) -> Shard:
        if tar.etag == UNREADABLE:
            return tar
        samples = _side_car_count(tar.url, options)
        return replace(tar, samples=scan(tar) if samples is None else samples)

    return list(map_in_threads(count, tars))


def count_folder(folder: Shard, listed: Folder, images: Sequence[str]) -> Shard:
    """The folder of files with its number of samples, and a digest of their names as its version.

    InputError: no file has one of the extensions of `images`.
    """
    if not (listed.samples or listed.unreadable):
        found = f", but {format_counts(listed.passed_over)}" if listed.passed_over else ""
        remedy = image_advice(listed.passed_over, images) or "name another folder"
        tars = ", or --format tar" if "tar" in listed.passed_over else ""
        raise InputError(f"{folder.url} holds no sample with extensions {' '.join(images)}{found}: {remedy}{tars}")
    return replace(folder, samples=len(listed.samples), etag=listing_digest(listed.samples))


def image_advice(passed_over: Mapping[str, int], images: Sequence[str]) -> str:
    """The flag that takes the pictures among the files that were passed over; "" where there are none.

    >>> image_advice({"dng": 3, "md": 1}, ["jpg"])
    'add --image-extensions jpg dng'
    """
    pictures = sorted(PICTURES.intersection(passed_over).difference(images))
    return f"add --image-extensions {' '.join([*images, *pictures])}" if pictures else ""


def _side_car_count(url: str, options: Options) -> int | None:
    """`successes` in NAME_stats.json, or the rows of NAME.parquet with status "success"; None without either."""
    folder, name = split_url(url)
    stem = tar_stem(name)
    store = Store(folder, options)
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
    """The rows of a Parquet side-car; only those with status "success" if it has that column."""
    from clip_batch.storage.arrow import ParquetFile

    table = ParquetFile(file)
    if "status" not in table.schema.names:
        return int(table.metadata.num_rows)
    return sum(piece["status"].to_pylist().count("success") for piece in table.pieces(65_536, ["status"]))
