"""Search an index: top-k over its memory-mapped shards, then the metadata of the hits.

A Searcher holds no state that a request changes, so any number of threads may share one.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from math import ceil
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clip_batch.config import SearchConfig, StorageConfig, parse_bytes
from clip_batch.config.paths import path_text
from clip_batch.config.texts import query_text
from clip_batch.embeddings.reader import blocks
from clip_batch.encoders.device import cores
from clip_batch.errors import ConfigError, CorruptError
from clip_batch.index import removed_rows
from clip_batch.index.ann import faiss_index, faiss_search, shards
from clip_batch.index.ann.order import best
from clip_batch.index.ann.predictor import Predictor
from clip_batch.index.ann.rerank import candidates, rerank
from clip_batch.index.ann.rows import Stacked
from clip_batch.index.ann.shards import OpenedIndex, Shards
from clip_batch.index.manifest import Manifest, load_manifest
from clip_batch.index.metadata import FEW, MetadataFile, common_schema, take_as, take_few, uniform
from clip_batch.search import clip_retrieval, lineage
from clip_batch.search.checks import check_columns, check_modality, checked_ids, checked_search, modality_in
from clip_batch.search.conditions import Condition, columns_in
from clip_batch.search.encoder import load_encoder
from clip_batch.search.evaluate import Check, Evaluator, unchecked
from clip_batch.search.find import Ranked, best_rows, check_criteria, find
from clip_batch.search.heads import load_heads
from clip_batch.search.prefilter import Prefilter
from clip_batch.search.query import Criteria, Query, check_kind
from clip_batch.search.results import SearchResult
from clip_batch.search.rows import EXACT, Ids, RowSet, Vectors, selection
from clip_batch.search.vectors import image_vectors, text_vectors
from clip_batch.search.where import Where
from clip_batch.storage.cache import IndexCache
from clip_batch.storage.npy import open_matrix, unit
from clip_batch.storage.retry import redact
from clip_batch.storage.store import Store
from clip_batch.types import Hit, StoredFile, StrPath

if TYPE_CHECKING:
    from clip_batch.encoders import Model

TOGETHER = 8
"""Record batches, each of up to 262,144 rows, for which a condition's sets of values are hashed once."""

SCANNING = 8
"""Most threads that score all stored vectors: each holds 16,384 vectors, 64 MB of 512 dimensions."""

SPARE = 0.01
"""Share of an inverted list that is not worth a visit to one more where rows were removed."""


class Searcher:
    """The live version of INDEX, open for search until `close`; a context manager.

    INDEX may be a folder that clip-retrieval's own `index` made (see `clip_batch.search.clip_retrieval`).
    A remote INDEX is first copied to a local cache (see `clip_batch.storage.cache`). Rows that were removed (see
    `clip_batch.index.removals`) are in no answer; their ids are refused. `indices` are the opened faiss indices of
    a modality, `tables` the metadata of each shard, `metadata_files` its local path and first id, in the order of ids.
    Errors: as `load_manifest`; CorruptError where a file is absent or not of its recorded size (or, as
    it is copied, sha256); ConfigError where the encoder's dimension is not the index's.
    """

    most = 2**31 - 1
    """The most hits that one search gives."""

    def __init__(
        self,
        index: StrPath,
        storage: StorageConfig = StorageConfig(),
        encoder: Model | None = None,
        config: SearchConfig = SearchConfig(),
    ) -> None:
        StorageConfig.expect(storage=storage), SearchConfig.expect(config=config)
        store = Store(path_text(index, "index"), storage.storage_options)
        self._files: dict[str, str] = {}
        if clip_retrieval.is_index(store):
            theirs = clip_retrieval.open_index(store, config.model, config.pretrained)
            self._files = theirs.files
        self.manifest: Manifest = theirs.manifest if self._files else load_manifest(store)
        self.storage, self.config = storage, config
        self.heads = load_heads(config, storage)
        self._prefilter = Prefilter(self)
        self._encoder = encoder
        if encoder is not None and encoder.dim != self.manifest.dim:
            raise ConfigError(f"{index} has {self.manifest.dim} dimensions, this encoder {encoder.dim}: take its model")
        self._offsets = np.array([shard.offset for shard in self.manifest.shards])
        self.indices: dict[str, Shards] = {}
        self.stored: dict[str, Stacked] = {}
        self._predictors: dict[str, dict[str, Predictor]] = {}
        self.tables: list[MetadataFile] = []
        self.metadata_files: list[tuple[str, int]] = []
        self._reconstruct, self._loading, self._closed = Lock(), Lock(), False
        limit = parse_bytes(storage.index_cache)
        self._cache = (
            None
            if store.local or self._files
            else IndexCache(store, self.manifest.version, self.manifest.searched_bytes, limit)
        )
        self._url = store.url
        self._mapped: dict[str, tuple[int, int]] = {}
        try:
            self._open(store)
        except BaseException:
            self._release()
            raise
        workers = min(max(len(shards.parts) for shards in self.indices.values()), cores())
        # Shards in parallel leave each worker its share of the cores.
        self._pool = ThreadPoolExecutor(workers, "search", faiss_index.use_threads, (max(1, cores() // workers),))

    def __enter__(self) -> Searcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the search threads and release the local cache. Whoever asks afterwards gets a ConfigError."""
        self._closed = True
        self._pool.shutdown()
        self._release()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError(f"the Searcher of {redact(self._url)} is closed: open another one")

    def _release(self) -> None:
        if self._cache:
            self._cache.close()
            self._cache = None

    def __repr__(self) -> str:
        return f"<Searcher of {redact(self._url)}: version {self.manifest.version}, {self.manifest.rows:,} rows>"

    @property
    def store(self) -> Store:
        """INDEX, whose files the index has been opened from."""
        return Store(self._url, self.storage.storage_options)

    def _open(self, store: Store) -> None:
        opened: dict[str, list[OpenedIndex]] = {modality: [] for modality in self.manifest.key}
        stored: dict[str, list[Any]] = {modality: [] for modality in self.manifest.key}
        files = self.manifest.files

        def local(name: str) -> str:
            return self._file(store, name, files[name])

        for shard in self.manifest.shards:
            paths = self.manifest.paths(shard)
            for modality, parts in opened.items():
                if (name := paths.index(modality, shard.name)) in files:
                    parts.append(OpenedIndex(faiss_index.read(local(name), mapped=True), shard.offset, shard.rows))
                if self.manifest.rerank:
                    stored[modality].append(open_matrix(local(paths.vectors(modality, shard.name))))
            self.metadata_files.append((local(paths.metadata(shard.name)), shard.offset))
            self.tables.append(MetadataFile(self.metadata_files[-1][0]))
            if self.tables[-1].rows != shard.rows:
                name = f"metadata of shard {shard.name}"
                raise CorruptError(f"{store.url}: {name} is not of {shard.rows} rows: merge again")
        for modality, joined in self.manifest.single.items():
            path, *_ = [local(name) for name in sorted(joined)]
            rows = self.manifest.rows - sum(part.rows for part in opened[modality])
            opened[modality].insert(0, OpenedIndex(faiss_index.read(path, mapped=True), 0, rows))
        for modality, predictions in self.manifest.predicted.items():
            paths_of = {kind: path for kind, prediction in predictions.items() for path in prediction["file"]}
            self._predictors[modality] = {
                kind: Predictor.of_array(np.load(local(path))) for kind, path in paths_of.items()
            }
        self.stored = {modality: Stacked(matrices) for modality, matrices in stored.items() if matrices}
        self.schema = common_schema([table.schema for table in self.tables])
        self._uniform = uniform(self.tables)
        self.removed = removed_rows.removed_ids(store, self.manifest, self.metadata_files)
        for modality, parts in opened.items():
            alive = [replace(part, removed=self._removed(part.offset, part.rows)) for part in parts]
            self.indices[modality] = Shards.of(alive)

    def shortened(self) -> str:
        """The path of a file that is shorter than when it was opened, "" if there is none.

        To read what such a file has lost ends the process (SIGBUS), as files are memory-mapped.
        """
        for path, (inode, size) in self._mapped.items():
            with suppress(OSError):  # a file that was removed or replaced stays as it was for who has mapped it
                status = os.stat(path)
                if status.st_ino == inode and status.st_size < size:
                    return path
        return ""

    def _file(self, store: Store, name: str, recorded: StoredFile) -> str:
        """A local path of a file of INDEX, of the recorded size."""
        path = self._located(store, name, recorded)
        status = os.stat(path)
        self._mapped[path] = status.st_ino, status.st_size
        return path

    def _located(self, store: Store, name: str, recorded: StoredFile) -> str:
        if self._files:
            return self._files[name]
        try:
            if store.size(name) != recorded["bytes"]:
                problem = f"does not have the recorded size of {recorded['bytes']} bytes"
                raise CorruptError(f"{store.display(name)} {problem}: merge again")
        except FileNotFoundError:
            raise CorruptError(f"{store.display(name)} is missing: merge again") from None
        return self._cache.file(name, recorded) if self._cache else store.path(name)

    @property
    def encoder(self) -> Model:
        """The encoder that made the index, loaded when it is first needed; EncoderError if it is not here."""
        with self._loading:
            if self._encoder is None:
                self._encoder = load_encoder(self.manifest.encoder, self.config, self.storage)
            return self._encoder

    def encode_text(self, texts: Sequence[str]) -> Vectors:
        """Query vectors float32 (n, d) of texts. ConfigError: `texts` is no list of them."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"texts is {reprlib.repr(texts)}: it must be a list of texts")
        for text in texts:
            query_text(text, "a text")
        if not len(texts):
            return np.empty((0, self.manifest.dim), np.float32)
        return text_vectors(self, texts)

    def encode_image(self, data: bytes) -> Vectors:
        """The query vector float32 (1, d) of an image file's bytes. ConfigError: they are not an image."""
        return image_vectors(self, data)

    def find(self, query: str | Query, columns: Sequence[str] | None = None) -> SearchResult:
        """The best hits of a query, which may be a text: its `k`, by default 10, or fewer if the index has no more.

            searcher.find(Query(text="a dog", where='license = "cc0"', unique=True, k=100), columns=["url"])

        `columns` are the metadata that hits carry, all by default. ConfigError: the index or the heads cannot answer
        the query. Other errors: as `clip_batch.search.vectors.query_vector`.
        """
        if columns is not None:
            check_columns(self.schema, columns)
        query = Query(text=query) if isinstance(query, str) else query
        if not isinstance(query, Query):
            raise ConfigError(f"query is {reprlib.repr(query)}: it must be a text, or of clip_batch.Query")
        self._check_open()
        ranked = best_rows(self, query, self.heads, prefilter=self._prefilter)
        hits = [hit.bound(self._image) for hit in self._hits(ranked, columns)]
        return SearchResult(hits, ranked.scanned, ranked.complete)

    def search(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        modality: str = "image",
        effort: int | None = None,
        where: Where | None = None,
        kind: str | None = None,
    ) -> list[list[Hit]]:
        """The k best hits of each query vector, best first; fewer where the index has fewer rows.

        `queries` is float (n, d) or (d,); scores are inner products (cosines for unit vectors).
        `effort` is nprobe or efSearch, by default what merge tuned for `kind`, which is "image" or "text" where all
        queries are vectors of images, or of texts. `where` is a condition on metadata, as in `Query`.
        ConfigError: a wrong argument.
        """
        vectors = checked_search(self.manifest, queries, k, modality, effort)
        if where is not None:
            criteria = Criteria(k=int(k), modality=modality, effort=effort, where=where, kind=kind)
            check_criteria(self, criteria, self.heads)
            return [self._hits(find(self, vector, criteria, prefilter=self._prefilter)) for vector in vectors]
        scores, ids = self.search_ids(vectors, k, modality, effort, kind=kind)
        flat = ids[ids >= 0]
        rows = iter(self.metadata(flat))
        return [
            [Hit(int(id), float(score), next(rows)) for id, score in zip(line, values, strict=True) if id >= 0]
            for line, values in zip(ids, scores, strict=True)
        ]

    def image(self, id: int) -> bytes | None:
        """The original image file of a row, by its place in a tar or a Parquet file; None where it cannot be read.

        Rows of embeddings that clip-retrieval made have none, as data could name any file. ConfigError: no such row.
        """
        (row,) = self.metadata([id])
        return self._image(Hit(id, 0.0, row))

    def _image(self, hit: Hit) -> bytes | None:
        if not lineage.is_planned(self.manifest, hit.id):
            return None
        columns = [name for name in lineage.COLUMNS if name in self.schema.names]
        row = hit.metadata if set(columns) <= set(hit.metadata) else self.metadata([hit.id], columns)[0]
        return lineage.image(row, self.storage)

    def _hits(self, ranked: Ranked, columns: Sequence[str] | None = None) -> list[Hit]:
        rows = self.metadata(ranked.ids, None if columns is None else list(columns))
        beauty = [None] * len(rows) if ranked.aesthetic is None else ranked.aesthetic.tolist()
        return [Hit(*hit) for hit in zip(ranked.ids.tolist(), ranked.scores.tolist(), rows, beauty, strict=True)]

    def search_ids(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        modality: str = "image",
        effort: int | None = None,
        among: RowSet | None = None,
        kind: str | None = None,
    ) -> tuple[Vectors, Ids]:
        """Scores float32 (n, k) and ids int64 (n, k), by descending score, then ascending id.

        A k beyond the rows of the index counts as the number of its rows. Places without a hit have -inf and -1. With
        `among`, only its rows can be hits: up to `EXACT` rows are all scored; of more, those in the lists that `effort`
        makes the index visit. Where merge found it better for queries of this `kind`, the lists that are visited are
        predicted, unless `effort` or `among` is given, k is over `MOST_PREDICTED`, or they hold fewer than k rows.
        Errors as `search`.
        """
        self._check_open()
        vectors = checked_search(self.manifest, queries, k, modality, effort)
        modality = modality_in(self.manifest, modality)
        check_kind(kind)
        k = min(int(k), self.manifest.rows)
        if among is not None and among.count <= EXACT:
            with suppress(ConfigError):  # some kinds of index give no vectors back
                return self._exact(vectors, among.ids, k, modality)

        if effort is None and among is None and (tuned := self.manifest.predicted_effort(modality, k, kind)):
            assert kind is not None
            tuned = self._spread(tuned, among)
            scores, ids = self._ranked(vectors, k, modality, tuned, None, self._predictors[modality][kind])
            if (ids[:, -1:] >= 0).all():
                return scores, ids
        if effort is None and (tuned := self.manifest.effort_for(modality, k, kind)):
            effort = self._spread(tuned, among)
        return self._ranked(vectors, k, modality, effort, among)

    def _spread(self, effort: int, among: RowSet | None = None) -> int:
        """The effort at which as many rows that may be hits are scored as by `effort` where every row may be one.

        Removed rows and those that are not `among` still lie in the lists: fewer are left in each.
        """
        possible = among.count if among is not None else self.manifest.rows - len(self.removed)
        return min(ceil(effort * self.manifest.rows / max(possible, 1) - SPARE), self.manifest.rows)

    def _ranked(
        self,
        vectors: Vectors,
        k: int,
        modality: str,
        effort: int | None,
        among: RowSet | None,
        predictor: Predictor | None = None,
    ) -> tuple[Vectors, Ids]:
        """Search all shards as `search_ids` does, and rank what they find."""
        stored, depth = self.stored.get(modality), k
        if stored is not None:
            depth = candidates(depth, self.manifest.rerank)
        search = partial(shards.search, self.indices[modality], self._pool, vectors, depth, effort, predictor)
        scores, ids = search(removed_of=lambda part: among.others(part.offset, part.rows)) if among else search()
        return (scores, ids) if stored is None else rerank(vectors, ids, stored, k)

    def _exact(self, queries: Vectors, ids: Ids, k: int, modality: str) -> tuple[Vectors, Ids]:
        """Search a few rows, as `search_ids` does, by scoring all of them."""
        vectors = self.reconstruct(ids, modality)
        indexed = vectors.any(axis=1)  # a row without a caption is in no text index
        scores = queries @ vectors[indexed].T
        return best(scores, np.broadcast_to(ids[indexed], scores.shape), k)

    def select(self, ids: npt.ArrayLike) -> RowSet:
        """Select rows for `search_ids`, less those that were removed. ConfigError: an id is no id of this index."""
        return selection(self.manifest, self.removed, ids)

    def where(self, condition: Condition, check: Check = unchecked) -> RowSet:
        """The rows for which a condition is true, without those that were removed; reads every value of its columns.

        `check` is called every now and then, and may raise. ConfigError: the index has no such column.
        """
        self._check_open()
        names = columns_in(condition)
        check_columns(self.schema, names)
        schema = pa.schema([self.schema.field(name) for name in names])
        mask, start, evaluator = np.empty(self.manifest.rows, dtype=bool), 0, Evaluator(condition, check)
        for table in self.tables:
            batches = table.scan(schema)
            while group := list(islice(batches, TOGETHER)):
                true = evaluator.matches(pa.Table.from_batches(group))
                mask[start : start + len(true)] = true
                start += len(true)
        mask[self.removed] = False
        return RowSet.of(mask)

    def search_over(
        self, query: npt.ArrayLike, threshold: float, modality: str = "image", effort: int | None = None
    ) -> Iterator[tuple[Vectors, Ids]]:
        """Yield scores (n,) and ids (n,) of the rows that score `threshold` or more, index by index, in order of ids.

        Where exact vectors are stored these are all such rows; elsewhere those in the lists that `effort` makes the
        index visit. `query` is (d,).
        """
        self._check_open()
        vector = checked_search(self.manifest, query, 1, modality, effort)[:1]
        modality = modality_in(self.manifest, modality)
        stored = self.stored.get(modality)
        if effort is None and (tuned := self.manifest.effort[modality]):
            effort = self._spread(tuned)
        if stored is None:
            yield from shards.search_over(self.indices[modality], vector, threshold, effort)
            return

        def scan(block: slice) -> tuple[Vectors, Ids]:
            ids = np.arange(part.offset + block.start, part.offset + block.stop)
            ids = ids[~removed_rows.contains(self.removed, ids)]
            scores = unit(stored[ids]) @ vector[0]
            return scores[scores >= threshold], ids[scores >= threshold]

        with ThreadPoolExecutor(min(SCANNING, cores()), "scan") as pool:
            for part in self.indices[modality].parts:
                yield from pool.map(scan, blocks(part.rows))

    def _removed(self, offset: int, rows: int) -> faiss_search.Removed | None:
        """The removed rows in [offset, offset + rows), counted from `offset`; None if none of these was removed."""
        low, high = np.searchsorted(self.removed, [offset, offset + rows])
        return faiss_search.Removed(self.removed[low:high] - offset) if low < high else None

    def table(self, ids: npt.ArrayLike, columns: list[str] | None = None) -> pa.Table:
        """The metadata of rows (n,) as an Arrow table, in the order of `ids`; errors as `metadata`."""
        self._check_open()
        rows, schema = checked_ids(self.manifest, self.removed, ids), self.schema
        if columns is not None:
            check_columns(schema, columns)
            schema = pa.schema([schema.field(name) for name in columns])
        owner = np.searchsorted(self._offsets, rows, "right") - 1
        if self._uniform and len(rows) <= FEW:
            files = [self.tables[shard] for shard in owner]
            if (few := take_few(files, rows - self._offsets[owner], schema.names)) is not None:
                return few
        order = np.argsort(owner, kind="stable")
        pieces = [schema.empty_table()]
        for shard in np.unique(owner):
            in_shard = rows[order][owner[order] == shard] - self._offsets[shard]
            pieces.append(take_as(self.tables[shard], in_shard, schema))
        table = pa.concat_tables(pieces)
        if np.array_equal(order, np.arange(len(order))):
            return table
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return table.take(pa.array(inverse))

    def metadata(self, ids: npt.ArrayLike, columns: list[str] | None = None) -> list[dict[str, Any]]:
        """The metadata of rows (n,), in the order of `ids`. ConfigError: an id or a column is not in the index."""
        if columns is not None and not len(columns):  # a table without columns has no rows
            return [{} for _ in checked_ids(self.manifest, self.removed, ids)]
        rows: list[dict[str, Any]] = self.table(ids, columns).to_pylist()
        return rows

    def reconstruct(self, ids: npt.ArrayLike, modality: str = "image") -> Vectors:
        """The vectors float32 (n, d) of rows, as exact as the index stores them; zero for a row without one.

        ConfigError: an id is not in the index, or this kind of index cannot give vectors back.
        """
        return self.vectors(checked_ids(self.manifest, self.removed, ids), modality)

    def vectors(self, rows: Ids, modality: str = "image") -> Vectors:
        """As `reconstruct`, of ids int64 (n,) that are in the index, also of rows that were removed."""
        self._check_open()
        check_modality(self.manifest, modality)
        modality = modality_in(self.manifest, modality)
        parts = self.indices[modality].parts
        if modality in self.stored:
            return unit(self.stored[modality][rows])
        out = np.zeros((len(rows), self.manifest.dim), dtype=np.float32)
        owner = np.searchsorted([part.offset for part in parts], rows, "right") - 1
        with self._reconstruct:  # faiss builds its table of ids once; searches do not use it
            for number in np.unique(owner):
                faiss_index.prepare_reconstruct(parts[number].index)
        for place, (id, number) in enumerate(zip(rows, owner, strict=True)):
            vector = faiss_index.reconstruct(parts[number].index, int(id - parts[number].offset))
            if vector is not None:
                out[place] = vector
        return out
