"""Search an index: top-k over its memory-mapped shards, then the metadata of the hits.

A Searcher holds no state that a request changes, so any number of threads may share one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clip_batch import encoders
from clip_batch import index as faiss_index
from clip_batch.cache import IndexCache
from clip_batch.config import SearchConfig, StorageConfig, parse_bytes
from clip_batch.decode import DecodeError, open_image
from clip_batch.errors import ConfigError, CorruptError
from clip_batch.manifest import IndexShard, Manifest, load_manifest
from clip_batch.metadata import MetadataFile, open_table
from clip_batch.store import Store
from clip_batch.types import Hit

if TYPE_CHECKING:
    from clip_batch.encoders import Encoder

MAX_PIXELS = 50_000_000
"""Of an image that searches: strangers may send it."""

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Searcher:
    """The live version of INDEX, open for search until `close`; a context manager.

    A remote INDEX is first copied to a local cache (see `clip_batch.cache`).
    Errors: as `load_manifest`; CorruptError where a file is absent or not of its recorded size (or, as
    it is copied, sha256); ConfigError where the encoder's dimension is not the index's.
    """

    def __init__(
        self,
        index: str,
        storage: StorageConfig = StorageConfig(),
        encoder: Encoder | None = None,
        config: SearchConfig = SearchConfig(),
    ) -> None:
        store = Store(index, storage.storage_options)
        self.manifest: Manifest = load_manifest(store)
        self.storage, self.config = storage, config
        self._encoder = encoder
        if encoder is not None and encoder.dim != self.manifest.dim:
            raise ConfigError(f"{index} has {self.manifest.dim} dimensions, this encoder {encoder.dim}: take its model")
        self._offsets = np.array([shard.offset for shard in self.manifest.shards])
        self._indices: dict[str, list[Any]] = {modality: [] for modality in self.manifest.key}
        self._metadata: list[MetadataFile] = []
        self._reconstruct, self._loading = Lock(), Lock()
        size = sum(wanted["bytes"] for shard in self.manifest.shards for wanted in shard.files.values())
        limit = parse_bytes(storage.index_cache)
        self._cache = None if store.local else IndexCache(store, self.manifest.version, size, limit)
        try:
            self._open(store)
        except BaseException:
            self._release()
            raise
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(len(self.manifest.shards), cores)
        # Shards in parallel leave each worker its share of the cores.
        self._pool = ThreadPoolExecutor(workers, "search", faiss_index.use_threads, (max(1, cores // workers),))

    def __enter__(self) -> Searcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the search threads, and let go of the local cache."""
        self._pool.shutdown()
        self._release()

    def _release(self) -> None:
        if self._cache:
            self._cache.close()
            self._cache = None

    def _open(self, store: Store) -> None:
        for shard in self.manifest.shards:
            for modality, opened in self._indices.items():
                opened.append(faiss_index.read(self._file(store, shard, f"{modality}/{shard.name}.index"), mapped=True))
            self._metadata.append(open_table(self._file(store, shard, f"metadata/{shard.name}.arrow")))
            if self._metadata[-1].rows != shard.rows:
                name = f"metadata of shard {shard.name}"
                raise CorruptError(f"{store.url}: {name} is not of {shard.rows} rows: merge again")

    def _file(self, store: Store, shard: IndexShard, name: str) -> str:
        """A local path of one of a shard's files, of the recorded size."""
        whole, wanted = f"{self.manifest.version}/{name}", shard.files[name]
        try:
            if store.size(whole) != wanted["bytes"]:
                raise CorruptError(f"{store.display(whole)} is not of {wanted['bytes']} bytes as recorded: merge again")
        except FileNotFoundError:
            raise CorruptError(f"{store.display(whole)} is missing: merge again") from None
        return self._cache.file(name, wanted) if self._cache else store.path(whole)

    @property
    def encoder(self) -> Encoder:
        """The encoder that made the index, loaded when it is first needed; EncoderError if it is not here."""
        with self._loading:
            if self._encoder is None:
                spec = self.manifest.encoder
                if self.config.model or self.config.pretrained:
                    names = self.config.model or spec.model, self.config.pretrained or spec.pretrained
                    found = encoders.resolve(*names, spec.preprocess, spec.precision, self.storage.storage_options)
                    spec = replace(found, weights=spec.weights)
                self._encoder = encoders.load(spec, self.config.device, self.storage.storage_options)
            return self._encoder

    def encode_text(self, texts: Sequence[str]) -> Vectors:
        """Query vectors float32 (n, d) of texts."""
        return self.encoder.encode_texts(texts)

    def encode_image(self, data: bytes) -> Vectors:
        """The query vector float32 (1, d) of an image file's bytes; ConfigError if it is none."""
        try:
            image = open_image(data, MAX_PIXELS)
        except DecodeError as error:
            raise ConfigError(f"the query image cannot be used: {error}") from None
        return self.encoder.encode_images(self.encoder.preprocess(image)[None])

    def search(
        self, queries: npt.ArrayLike, k: int = 10, modality: str = "image", effort: int | None = None
    ) -> list[list[Hit]]:
        """The k best hits of each query, best first; fewer where the index has fewer rows.

        `queries` is float (n, d) or (d,); scores are inner products (cosines for unit vectors).
        `effort` is nprobe or efSearch, by default what merge tuned. ConfigError: a wrong argument.
        """
        scores, ids = self.search_ids(queries, k, modality, effort)
        flat = ids[ids >= 0]
        rows = iter(self.metadata(flat))
        return [
            [Hit(int(id), float(score), next(rows)) for id, score in zip(line, values, strict=True) if id >= 0]
            for line, values in zip(ids, scores, strict=True)
        ]

    def search_ids(
        self, queries: npt.ArrayLike, k: int = 10, modality: str = "image", effort: int | None = None
    ) -> tuple[Vectors, Ids]:
        """Scores float32 (n, k) and ids int64 (n, k), by descending score, then ascending id.

        Places without a hit have -inf and -1. Otherwise as `search`.
        """
        wanted = self._queries(queries)
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise ConfigError(f"k is {k!r}: it must be 1 or more")
        if effort is not None and effort < 1:
            raise ConfigError(f"effort is {effort}: it must be 1 or more")
        shards = self._modality(modality)
        effort = self.manifest.effort[modality] if effort is None else effort

        def one(shard: int) -> tuple[Vectors, Ids]:
            depth = min(int(k), self.manifest.shards[shard].rows)
            scores, ids = faiss_index.search(shards[shard], wanted, depth, effort)
            found = ids >= 0
            return np.where(found, scores, -np.inf), np.where(found, ids + self._offsets[shard], -1)

        parts = list(self._pool.map(one, range(len(shards))))
        scores = np.hstack([part[0] for part in parts]).astype(np.float32)
        ids = np.hstack([part[1] for part in parts])
        best = np.lexsort((ids, -scores), axis=-1)[:, :k]
        room = [(0, 0), (0, int(k) - best.shape[1])]
        return (
            np.pad(np.take_along_axis(scores, best, 1), room, constant_values=-np.inf),
            np.pad(np.take_along_axis(ids, best, 1), room, constant_values=-1),
        )

    def _modality(self, modality: str) -> list[Any]:
        if modality not in self._indices:
            raise ConfigError(f"modality {modality!r} is not in this index: it has {', '.join(self._indices)}")
        return self._indices[modality]

    def _queries(self, queries: npt.ArrayLike) -> Vectors:
        try:
            wanted = np.ascontiguousarray(np.atleast_2d(np.asarray(queries)), dtype=np.float32)
        except (TypeError, ValueError):
            raise ConfigError("queries are not an array of numbers") from None
        if wanted.ndim != 2 or wanted.shape[1] != self.manifest.dim:
            raise ConfigError(f"queries have shape {wanted.shape}: this index wants (n, {self.manifest.dim})")
        if not np.isfinite(wanted).all():
            raise ConfigError("queries contain NaN or infinity")
        return wanted

    def metadata(self, ids: npt.ArrayLike, columns: list[str] | None = None) -> list[dict[str, Any]]:
        """The metadata of rows (n,), in the order asked. ConfigError: an id or a column is not in the index."""
        wanted, known = self._ids(ids), self._metadata[0].schema.names
        if columns is not None and (unknown := [name for name in columns if name not in known]):
            raise ConfigError(f"no metadata column {', '.join(unknown)}: there are {', '.join(known)}")
        rows: list[dict[str, Any]] = [{} for _ in wanted]
        owner = np.searchsorted(self._offsets, wanted, "right") - 1
        for shard in np.unique(owner):
            places = np.flatnonzero(owner == shard)
            table = self._metadata[shard].take(wanted[places] - self._offsets[shard], columns)
            for place, row in zip(places, table.to_pylist(), strict=True):
                rows[place] = row
        return rows

    def reconstruct(self, ids: npt.ArrayLike, modality: str = "image") -> Vectors:
        """The vectors float32 (n, d) of rows, as exact as the index stores them; zero for a row without one.

        ConfigError: an id is not in the index, or its kind cannot give vectors back.
        """
        wanted, shards = self._ids(ids), self._modality(modality)
        out = np.zeros((len(wanted), self.manifest.dim), dtype=np.float32)
        owner = np.searchsorted(self._offsets, wanted, "right") - 1
        with self._reconstruct:  # the table of ids is made once; searches do not look at it
            for shard in np.unique(owner):
                faiss_index.prepare_reconstruct(shards[shard])
        for place, (id, shard) in enumerate(zip(wanted, owner, strict=True)):
            vector = faiss_index.reconstruct(shards[shard], int(id - self._offsets[shard]))
            if vector is not None:
                out[place] = vector
        return out

    def _ids(self, ids: npt.ArrayLike) -> Ids:
        wanted = np.asarray(ids).reshape(-1)
        if not len(wanted):
            return np.empty(0, dtype=np.int64)
        if wanted.dtype.kind not in "iu" or wanted.min() < 0 or wanted.max() >= self.manifest.rows:
            raise ConfigError(f"ids are whole numbers from 0 to {self.manifest.rows - 1}")
        return wanted.astype(np.int64)


def describe_hits(hits: Sequence[Hit]) -> str:
    """Hits as lines for people: rank, score, key, caption."""
    lines = []
    for rank, hit in enumerate(hits, 1):
        caption = " ".join(str(hit.metadata.get("caption") or "").split())[:100]
        lines.append(f"{rank:3d}  {hit.score:.3f}  {hit.metadata.get('key')}  {caption}".rstrip())
    return "\n".join(lines) or "no hits"
