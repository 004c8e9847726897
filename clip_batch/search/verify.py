"""The rest of verify --index: a proof that no query finds a removed row of the live version, by asking for each.

Every reader of an index (searches, filters, datasets, exports, `clip_batch.read`, the service) opens it as a Searcher
and leaves out the rows that `Searcher.removed` has. The proof opens one as they do, and searches with the vectors of
removed rows themselves, which nothing resembles more.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from clip_batch.config import StorageConfig
from clip_batch.embeddings.verify import VerifyReport
from clip_batch.errors import ClipBatchError, ConfigError
from clip_batch.index import removals, removed_rows
from clip_batch.index.manifest import load_manifest
from clip_batch.index.paths import VersionPaths
from clip_batch.index.publications import read_state
from clip_batch.index.verify import verify_index
from clip_batch.search.rows import Ids
from clip_batch.search.searcher import Searcher
from clip_batch.storage.store import Store
from clip_batch.types import StrPath

SAMPLE = 1_000
"""Removed rows that are searched for, evenly spread; with --deep `DEEP`, which is all of them but in large indices."""

DEEP = 100_000

WHOLE, LARGE = 10, 1_000_000
"""So many removed rows are also looked for over a threshold, and one in an index of more than so many rows, with
--deep: that may score every row of the index."""

K = 100
BLOCK = 256
"""Rows whose vectors are searched together."""


def verify_searches(index: StrPath, deep: bool = False, storage: StorageConfig = StorageConfig()) -> VerifyReport:
    """Check the files of the live version of INDEX, as `verify_index`, and that no search finds a removed row of it.

    `deep` also looks through the metadata for the rows of every removal list, and compares what was cached. A remote
    INDEX is searched only with `deep`, as that copies it to the local cache. ConfigError: there is no index.
    """
    store = Store(index, storage.storage_options)
    report = verify_index(store, deep)
    if "what is live" in report.problems:
        return report
    manifest = load_manifest(store, read_state(store, mending=False).version)
    known = removed_rows.removed_if_known(store, manifest)
    report.removed = 0 if known is None else len(known)
    nothing = known is not None and not len(known)
    if report.problems or not (store.local or deep) or (nothing and not (deep and removals.names(store))):
        return report
    try:
        with Searcher(index, storage) as searcher:
            report.removed = len(searcher.removed)
            if deep:
                report.problems |= dict(_stale(store, searcher))
            _search(searcher, report, deep)
    except ClipBatchError as error:
        report.problems["removed rows"] = str(error)
    return report


def _stale(store: Store, searcher: Searcher) -> Iterator[tuple[str, str]]:
    """The removal lists of which the version's cache has other rows than its metadata, and why that is wrong."""
    digests = removals.names(store)
    cached = removed_rows.cached(store, searcher.manifest, digests)
    lists = list(removals.load_all(store, digests))
    for digest, rows in zip(digests, removed_rows.find_removed(lists, searcher.metadata_files), strict=True):
        found = int(np.count_nonzero(~removed_rows.contains(searcher.removed, rows.ids)))
        if found or (digest in cached and not np.array_equal(cached[digest], rows.ids)):
            folder = store.display(VersionPaths(searcher.manifest.version).removals)
            wrong = f"{folder} does not have the rows that it removes, of which {found:,} can be found"
            yield f"removal list {digest}", f"{wrong}: delete that folder, which is a cache"


def _search(searcher: Searcher, report: VerifyReport, deep: bool) -> None:
    """Search for removed rows in all ways that there are; count them, and name those that are found."""
    removed, most = searcher.removed, DEEP if deep else SAMPLE
    whole = WHOLE if searcher.manifest.rows <= LARGE else int(deep)
    chosen = removed[np.unique(np.linspace(0, max(len(removed) - 1, 0), min(most, len(removed))).astype(np.int64))]
    found: set[int] = set()
    searched: set[int] = set()
    for modality in searcher.manifest.key:
        for start in range(0, len(chosen), BLOCK):
            ids = chosen[start : start + BLOCK]
            try:
                vectors = searcher.vectors(ids, modality)
            except ConfigError:  # a kind of index that gives no vectors back
                break
            has_vector = vectors.any(axis=1)
            ids, vectors = ids[has_vector], vectors[has_vector]
            if len(ids):
                for kind in (None, "image", "text"):
                    found |= _among(removed, searcher.search_ids(vectors, K, modality, kind=kind)[1])
                searched |= set(ids.tolist())
            for vector in vectors[:whole] if not start else ():
                for _, over in searcher.search_over(vector, float(vector @ vector) - 0.01, modality):
                    found |= _among(removed, over)
    found |= _among(removed, searcher.select(chosen).ids)
    for id in chosen[:WHOLE].tolist():
        try:
            searcher.metadata([id])
            found.add(id)
        except ConfigError:
            pass  # refused, as it should be
    report.searched = len(searched)
    if found:
        some = ", ".join(map(str, sorted(found)[:5]))
        report.problems["removed rows"] = f"{len(found):,} can be found, such as id {some}: do not serve this version"


def _among(removed: Ids, ids: Ids) -> set[int]:
    flat = ids.reshape(-1)
    return set(flat[removed_rows.contains(removed, flat)].tolist())
