"""Removing the rows of an index that an example or a condition finds.

They are found once and then named one by one, by shard, offset and key, so that they stay removed in every version.
The example itself is not kept: rows that are added later are not compared with it.
"""

from __future__ import annotations

import re
import reprlib
from dataclasses import replace

import numpy as np

from clip_batch.config import SearchConfig, StorageConfig
from clip_batch.config.paths import path_text
from clip_batch.errors import ConfigError
from clip_batch.index import removals, removed_rows
from clip_batch.index.manifest import load_manifest
from clip_batch.index.paths import removal_list
from clip_batch.index.removals import RowList, RowName
from clip_batch.index.remove import SAMPLE, RemovedRow, RemoveReport, Say
from clip_batch.search.checks import modality_in
from clip_batch.search.find import rows_over
from clip_batch.search.query import Query
from clip_batch.search.rows import Ids, Vectors
from clip_batch.search.searcher import Searcher
from clip_batch.search.where import Where, as_condition
from clip_batch.storage.store import Store
from clip_batch.types import StrPath

_NAME = ("shard", "offset", "key")


def remove_found(
    index: StrPath,
    query: Query | None = None,
    where: Where | None = None,
    config: SearchConfig = SearchConfig(),
    storage: StorageConfig = StorageConfig(),
    progress: Say = lambda line: None,
    note: str = "",
    dry_run: bool = False,
) -> RemoveReport:
    """Remove the rows of the live version that score a query's threshold or more, or that meet a condition.

    Every list of the index is visited, whatever effort was tuned. `dry_run` writes nothing, nor is anything written
    where there is no such row. ConfigError: there is no index, no threshold, or neither a query nor a condition.
    """
    if (query is None) == (where is None):
        raise ConfigError("rows are removed by a query or by a condition: give one of them")
    if query is not None and not isinstance(query, Query):
        raise ConfigError(f"query is {reprlib.repr(query)}: it must be of clip_batch.Query, with a threshold")
    store = Store(path_text(index, "index"), storage.storage_options)
    load_manifest(store)  # refuses the folder of an index that clip-retrieval made, which has no removals
    with Searcher(index, storage, config=config) as searcher:
        ids, scores = _found(searcher, query, where)
        best = np.argsort(-scores, kind="stable")[:SAMPLE] if scores is not None else np.arange(len(ids))[:SAMPLE]
        sample = tuple(_sample(searcher, ids[best], None if scores is None else scores[best]))
        exact = query is None or _is_exact(searcher, query.modality)
        version, digest, rows = searcher.manifest.version, "", len(ids)
        if len(ids):
            named = RowList.of(_names(searcher, ids))
            digest = named.digest
            ((ids, _),) = removed_rows.find_removed([named], searcher.metadata_files)
            rows = len(ids)
            if not dry_run:
                about = {"where": str(as_condition(where))} if query is None else {"query": query.describe()}
                removals.record(store, named, note, {**about, "version": version})
                progress(f"{len(named.rows):,} rows are removed, as {removal_list(digest)}")
                removed_rows.cache(store, searcher.manifest, digest, ids)
    return RemoveReport(digest, "", 0, version, rows, 0, (), dry_run, sample, exact)


def _found(searcher: Searcher, query: Query | None, where: Where | None) -> tuple[Ids, Vectors | None]:
    """The sorted ids (n,) of the rows that are to be removed, and their scores (n,) if there is a query."""
    if query is None:
        condition = as_condition(where)
        if condition is None:
            raise ConfigError("the condition is empty: every row would be removed")
        return searcher.where(condition).ids, None
    if query.threshold is None or query.k is not None or query.judged:
        raise ConfigError("rows are removed by a query with a threshold, and without k, unique, safe or aesthetic")
    every = replace(query, effort=max(searcher.manifest.rows, 1))
    pieces = [*rows_over(searcher, every, searcher.heads)]
    nothing = np.empty(0, np.float32), np.empty(0, np.int64)
    scores, ids = (np.concatenate(parts) for parts in zip(nothing, *pieces, strict=True))
    order = np.argsort(ids)
    return ids[order], scores[order]


def _names(searcher: Searcher, ids: Ids) -> list[RowName]:
    """What names rows in every version. ConfigError: the metadata cannot tell."""
    if missing := [name for name in _NAME if name not in searcher.schema.names]:
        raise ConfigError(
            f"rows are named by {', '.join(_NAME)}, and the metadata has no {missing[0]}: remove by values"
        )
    columns = searcher.table(ids, list(_NAME)).columns
    return [RowName(*name) for name in zip(*(column.to_pylist() for column in columns), strict=True)]


def _sample(searcher: Searcher, ids: Ids, scores: Vectors | None) -> list[RemovedRow]:
    shown = [name for name in ("key", "caption") if name in searcher.schema.names]
    rows = searcher.metadata(ids, shown)
    of_rows = [None] * len(ids) if scores is None else scores.tolist()
    pairs = zip(ids.tolist(), rows, of_rows, strict=True)
    return [RemovedRow(id, row.get("key"), row.get("caption"), score) for id, row, score in pairs]


def _is_exact(searcher: Searcher, modality: str) -> bool:
    """Whether an index scores the vectors themselves."""
    modality = modality_in(searcher.manifest, modality)
    key = searcher.manifest.key[modality]
    return modality in searcher.stored or bool(re.fullmatch(r"(IVF[^,]*,|HNSW\d*,)?Flat|HNSW\d*", key))
