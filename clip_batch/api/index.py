"""filter, remove, its list and undo, versions, status and gc of an index, and sweep, as functions."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import TYPE_CHECKING

from clip_batch.config import MergeConfig, SearchConfig, StorageConfig, SweepConfig
from clip_batch.config.paths import path_text
from clip_batch.errors import ConfigError
from clip_batch.index import gc, removal_history
from clip_batch.index import remove as removal
from clip_batch.index import status as stage
from clip_batch.index import versions as index_versions
from clip_batch.index.gc import GcReport
from clip_batch.index.manifest import load_manifest
from clip_batch.index.removal_history import RemovalInfo, UndoReport
from clip_batch.index.remove import RemoveReport
from clip_batch.index.status import IndexStatus
from clip_batch.index.versions import VersionInfo
from clip_batch.storage.store import Store
from clip_batch.types import StrPath

if TYPE_CHECKING:
    from clip_batch.export.filter import Filtered, ImagesFrom
    from clip_batch.index.merge.sweep import Sweep
    from clip_batch.search.query import Query
    from clip_batch.search.where import Where


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
    progress: Callable[[str], None] = lambda line: None,
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

    SearchConfig.expect(config=config), StorageConfig.expect(storage=storage)
    if isinstance(query, str):
        query = Query(text=query, threshold=threshold, k=k if k or threshold is not None else 10)
    elif not isinstance(query, Query):
        raise ConfigError(f"query is {reprlib.repr(query)}: it must be a text or a clip_batch.Query")
    elif threshold is not None or k is not None:
        raise ConfigError("filter has a Query, which has its own threshold and k: give them there")
    store = Store(path_text(output, "output"), storage.storage_options)
    with Searcher(index, storage, config=config) as searcher:
        return filter_rows(searcher, query, store, images, columns, images_from, progress)


def remove(
    index: StrPath,
    keys: StrPath | Iterable[str | int] | None = None,
    column: str = "key",
    *,
    query: Query | None = None,
    where: Where | None = None,
    note: str = "",
    dry_run: bool = False,
    config: SearchConfig = SearchConfig(),
    storage: StorageConfig = StorageConfig(),
    progress: Callable[[str], None] = lambda line: None,
) -> RemoveReport:
    """Remove rows from every version, now and later: by values of a metadata column, by an example or by a condition.

    `keys` is a list of values, or the path or URL of a file of them: one a line, or Parquet or CSV with that column.
    Rows that are added later are removed too where they have one. Otherwise `query`, which has an image or a vector and
    a threshold, or `where` finds rows of the live version, and these are removed. `note` is kept with the removal;
    `dry_run` writes nothing. `config` says where the query's model lies.

    Example: `remove("index", query=Query(image="me.jpg", threshold=0.95), dry_run=True).sample`.

    ConfigError: there is no value, no such column, the file cannot be read, or not just one of the three is given.
    """
    SearchConfig.expect(config=config), StorageConfig.expect(storage=storage)
    if (keys is None) + (query is None) + (where is None) != 2:
        raise ConfigError("remove needs one of keys, query and where")
    if keys is None:
        from clip_batch.search.remove import remove_found

        return remove_found(index, query, where, config, storage, progress, note, dry_run)
    if isinstance(keys, str | PathLike):
        return removal.remove(index, keys, column, storage, progress, note, dry_run)
    if isinstance(keys, bytes) or not isinstance(keys, Iterable):
        raise ConfigError(f"keys is {keys!r}: it must be a list of values, or the path of a file of them")
    if not isinstance(column, str):
        raise ConfigError(f"column is {column!r}: it must be the name of a metadata column")
    return removal.remove_values(index, [str(key) for key in keys], column, storage, progress, note, dry_run)


def removals(index: StrPath, *, storage: StorageConfig = StorageConfig()) -> list[RemovalInfo]:
    """The removals of INDEX, the oldest first, those that were undone too. ConfigError: there is no index."""
    StorageConfig.expect(storage=storage)
    return removal_history.list_removals(index, storage)


def undo_removal(
    index: StrPath, digest: str, *, note: str = "", storage: StorageConfig = StorageConfig()
) -> UndoReport:
    """Let a removal of INDEX no longer count, in any version; `removals` and `remove` tell its `digest`.

    ConfigError: there is no such removal, or it is undone already.
    """
    StorageConfig.expect(storage=storage)
    return removal_history.undo(index, digest, storage, note)


def versions(
    index: StrPath, *, use: str = "", drop: str = "", storage: StorageConfig = StorageConfig()
) -> list[VersionInfo]:
    """The versions of INDEX, the oldest first, once `use` has become the live one and `drop` is deleted.

    ConfigError: there is no index, or no such version, or it is needed. CorruptError: files of `use` are missing.
    """
    StorageConfig.expect(storage=storage)
    store = Store(path_text(index, "index"), storage.storage_options)
    if use:
        index_versions.use(store, use)
    if drop:
        index_versions.drop(store, drop)
    listed = index_versions.versions(store)
    if not listed:
        load_manifest(store)  # refuses a folder that is no index, such as a mistyped one
    return listed


def index_status(index: StrPath, *, storage: StorageConfig = StorageConfig()) -> IndexStatus:
    """Which version of INDEX is live and what it holds, which merges are unfinished, and which commands are due.

    ConfigError: there is no index. CorruptError: its live version cannot be told, or not be opened.
    """
    StorageConfig.expect(storage=storage)
    return stage.index_status(Store(path_text(index, "index"), storage.storage_options))


def gc_index(
    index: StrPath,
    *,
    keep: int = gc.KEEP,
    older_than: float = gc.OLDER_THAN,
    dry_run: bool = False,
    storage: StorageConfig = StorageConfig(),
) -> GcReport:
    """Delete the versions of INDEX that nothing needs, and what merges have left behind; `dry_run` only names them.

    `keep` versions that were live before the live one stay, and what was live or written to within `older_than` days.
    ConfigError: there is no index, or an argument is below 0. CorruptError: nobody can tell what is needed.
    """
    StorageConfig.expect(storage=storage)
    if not isinstance(keep, int) or keep < 0 or not isinstance(older_than, int | float) or not older_than >= 0:
        raise ConfigError(f"keep is {keep!r} and older_than {older_than!r}: both must be numbers, 0 or more")
    store = Store(path_text(index, "index"), storage.storage_options)
    return gc.gc_index(store, keep, older_than, dry_run)


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
    from clip_batch.index.merge import sweep as sweeping

    SweepConfig.expect(config=config), MergeConfig.expect(merge=merge), StorageConfig.expect(storage=storage)
    return sweeping.sweep(path_text(output, "output"), merge, storage, config, progress)
