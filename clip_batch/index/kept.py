"""The files of a version that no search reads, but `merge --add` does: the trained template, and the recall trials.

Their sizes and sha256 are in the records of the tasks that wrote them, `template/record.json` and
`shards/<shard>.json`; `verify --index` and every merge that reads them compare.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from clip_batch.embeddings.verify import check_file
from clip_batch.errors import CorruptError
from clip_batch.index.manifest import Manifest
from clip_batch.index.paths import VersionPaths, is_file_name
from clip_batch.storage.retry import corrupt_unless_unavailable
from clip_batch.storage.store import Store, file_digest
from clip_batch.types import StoredFile

ADD_REMEDY = "merge --add needs it: put it back from a copy, or merge everything into a new INDEX"

Files = dict[str, StoredFile]
"""Files by their path below INDEX."""


def read_record(store: Store, name: str) -> dict[str, Any]:
    """The record of a merge task. CorruptError: it is missing, or is none."""
    with corrupt_unless_unavailable(f"{store.display(name)} cannot be read", ADD_REMEDY, ValueError):
        return parse_record(store.read(name), f"{store.display(name)} is not the record of a merge task: {ADD_REMEDY}")


def parse_record(data: bytes, problem: str) -> dict[str, Any]:
    """The record of a merge task, whose names stay in their folder. CorruptError: it is none, with this message."""
    with contextlib.suppress(ValueError):
        record = json.loads(data)
        if isinstance(record, dict) and isinstance(record.get("files"), dict):
            names = [record.get("attempt"), *record["files"], *filter(None, map(record.get, ("template", "reference")))]
            if all(map(is_file_name, names)):
                return record
    raise CorruptError(problem)


def adds_nothing(store: Store, version: str) -> bool:
    """Whether an unfinished version is what a `merge --add` left that found no new row when it trained."""
    try:
        record = read_record(store, VersionPaths(version).template_record)
    except CorruptError:  # not trained yet
        return False
    return bool(record.get("reference")) and record.get("rows") == record.get("left_out", 0)


def template_files(version: VersionPaths, record: Mapping[str, Any]) -> Files:
    """The files that the record of a version's training names."""
    folder = version.template(record["attempt"]).folder
    return {f"{folder}/{name}": file for name, file in record["files"].items()}


def trial_file(store: Store, version: VersionPaths, shard: str) -> Files:
    """The file of a shard's recall trials, in the version that built the shard. CorruptError: as `read_record`."""
    record = read_record(store, version.shard_record(shard))
    name = VersionPaths().truth(shard)
    return {version.file(name): record["files"][name]} if name in record["files"] else {}


def problems(store: Store, manifest: Manifest, deep: bool) -> Iterator[tuple[str, str]]:
    """What is wrong with these files of a version, by what they are: sizes, and with `deep` every byte."""

    def template(version: VersionPaths) -> Files:
        return template_files(version, read_record(store, version.template_record))

    kinds: list[tuple[str, Callable[[], Files]]] = [
        ("template" if version == manifest.template else "training", partial(template, VersionPaths(version)))
        for version in dict.fromkeys([manifest.template or manifest.version, manifest.version])
    ]
    kinds += [
        (f"recall trials of index shard {shard.name}", partial(trial_file, store, manifest.paths(shard), shard.name))
        for shard in manifest.shards
    ]

    def check(kind: tuple[str, Callable[[], Files]]) -> tuple[str, str] | None:
        what, files = kind
        try:
            found = (check_file(store, name, stored, deep) for name, stored in files().items())
            problem = next(filter(None, found), None)
        except CorruptError as error:
            return what, str(error)
        return (what, f"{problem}; searches do without it, {ADD_REMEDY}") if problem else None

    with ThreadPoolExecutor(8) as pool:
        yield from filter(None, pool.map(check, kinds))


@contextmanager
def fetched(store: Store, name: str, stored: StoredFile, remedy: str) -> Iterator[str]:
    """A local path of such a file, once its content is seen to be what was recorded. CorruptError: it is not."""
    try:
        size = store.size(name)
    except FileNotFoundError:
        raise CorruptError(f"{store.display(name)} is missing: {remedy}") from None
    with store.fetch(name) as path:
        if size != stored["bytes"] or os.path.getsize(path) != size or file_digest(path) != stored["sha256"]:
            raise CorruptError(f"{store.display(name)} is not what was written (sha256 differs): {remedy}")
        yield path
