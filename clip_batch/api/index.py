"""filter, remove, versions and sweep, as functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import TYPE_CHECKING

from clip_batch.config import MergeConfig, SearchConfig, StorageConfig, SweepConfig
from clip_batch.config.paths import path_text
from clip_batch.errors import ConfigError
from clip_batch.index import remove as removal
from clip_batch.index import versions as index_versions
from clip_batch.index.manifest import load_manifest
from clip_batch.index.remove import RemoveReport
from clip_batch.index.versions import VersionInfo
from clip_batch.storage.store import Store
from clip_batch.types import StrPath

if TYPE_CHECKING:
    from clip_batch.export.filter import Filtered, ImagesFrom
    from clip_batch.index.merge.sweep import Sweep
    from clip_batch.search.query import Query


def filter(
    index: StrPath,
    query: str | Query,
    output: StrPath,
    *,
    threshold: float | None = None,
    k: int | None = None,
    columns: Sequence[str] | None = None,
    images: bool = False,
    images_from: ImagesFrom = "tar",
    config: SearchConfig = SearchConfig(),
    storage: StorageConfig = StorageConfig(),
) -> Filtered:
    """Write every row over a threshold, or the k best, to the folder `output` as Parquet, and their images if asked.

    `query` is a text, with `threshold` or `k`, or a Query that has its own. `columns` are the metadata columns that are
    written, by default all. `images` copies pictures into tars: by their byte range in a tar, or from the column
    `image_path` or `url` where `images_from` is "path" or "url". `config` says where models and heads lie.

    Example: `filter("index", "a red bicycle", "found", threshold=0.3, images=True)`.

    ConfigError: an argument is wrong, or `output` has other files.
    """
    from clip_batch.export.filter import filter_rows
    from clip_batch.search.query import Query
    from clip_batch.search.searcher import Searcher

    if isinstance(query, str):
        query = Query(text=query, threshold=threshold, k=k if k or threshold is not None else 10)
    elif threshold is not None or k is not None:
        raise ConfigError("filter has a Query, which has its own threshold and k: give them there")
    store = Store(path_text(output, "output"), storage.storage_options)
    with Searcher(index, storage, config=config) as searcher:
        return filter_rows(searcher, query, store, images, columns, images_from)


def remove(
    index: StrPath,
    keys: StrPath | Iterable[str | int],
    column: str = "key",
    *,
    storage: StorageConfig = StorageConfig(),
    progress: Callable[[str], None] = lambda line: None,
) -> RemoveReport:
    """Remove the rows that have one of some values in a metadata column, from every version, now and later.

    `keys` is a list of values, or the path or URL of a file of them: one a line, or Parquet or CSV with that column.
    ConfigError: there is no value, no such column, or the file cannot be read.
    """
    if isinstance(keys, str | PathLike):
        return removal.remove(index, keys, column, storage, progress)
    if isinstance(keys, bytes) or not isinstance(keys, Iterable):
        raise ConfigError(f"keys is {keys!r}: it must be a list of values, or the path of a file of them")
    return removal.remove_values(index, [str(key) for key in keys], column, storage, progress)


def versions(
    index: StrPath, *, use: str = "", drop: str = "", storage: StorageConfig = StorageConfig()
) -> list[VersionInfo]:
    """The versions of INDEX, the oldest first, once `use` has become the live one and `drop` is deleted.

    ConfigError: there is no index, or no such version, or it is needed. CorruptError: files of `use` are missing.
    """
    store = Store(path_text(index, "index"), storage.storage_options)
    if use:
        index_versions.use(store, use)
    if drop:
        index_versions.drop(store, drop)
    listed = index_versions.versions(store)
    if not listed:
        load_manifest(store)  # refuses a folder that is no index, such as a mistyped one
    return listed


def sweep(
    output: StrPath,
    config: SweepConfig = SweepConfig(),
    *,
    merge: MergeConfig = MergeConfig(),
    storage: StorageConfig = StorageConfig(),
    progress: Callable[[str], None] = lambda line: None,
) -> Sweep:
    """Try index keys on a sample of OUT: recall, milliseconds a query, bytes a vector, and which one to take.

    `merge` says what the index is to reach, as for `clip_batch.merge`; errors as there.
    """
    from clip_batch.index.merge import sweep as stage

    return stage.sweep(path_text(output, "output"), merge, storage, config, progress)
