"""The rows that an export writes: those of an index's live version that were not removed, and their vectors.

Exact vectors come from INDEX if it holds them, otherwise from the OUT that was merged. If that OUT cannot be read, or
has changed, the vectors are the index's approximations, and `exact` is false.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clip_batch.embeddings.metadata import LINEAGE
from clip_batch.embeddings.outputs import Outputs
from clip_batch.embeddings.reader import Embeddings
from clip_batch.errors import ClipBatchError, ConfigError, CorruptError
from clip_batch.index.held import commit_digest, read_source
from clip_batch.index.manifest import IndexShard
from clip_batch.index.merge.job import digest, open_source
from clip_batch.search.searcher import Searcher
from clip_batch.storage.npy import unit
from clip_batch.storage.store import Store

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
Half = npt.NDArray[np.float16]

BLOCK = 16_384
"""Rows that are counted, read and written together. It is the largest number of rows in one answer of Milvus."""

FEW = 1_000
"""Up to this many rows are read one by one from OUT; for more, all rows of their index shard are read at once."""


class IndexRows:
    """The rows of an open index that were not removed, and their metadata."""

    def __init__(self, searcher: Searcher) -> None:
        self._searcher, self.manifest = searcher, searcher.manifest

    def __len__(self) -> int:
        return self.manifest.rows - len(self._searcher.removed)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield ranges [start, stop) of at most BLOCK ids, in order, each within one index shard."""
        for shard in self.manifest.shards:
            end = shard.offset + shard.rows
            yield from ((start, min(start + BLOCK, end)) for start in range(shard.offset, end, BLOCK))

    def removed(self, start: int, stop: int) -> Ids:
        """Return the sorted ids in [start, stop) that were removed."""
        low, high = np.searchsorted(self._searcher.removed, [start, stop])
        return self._searcher.removed[low:high]

    def ids(self, start: int, stop: int) -> Ids:
        """Return the sorted ids in [start, stop) that were not removed."""
        return np.setdiff1d(np.arange(start, stop), self.removed(start, stop), assume_unique=True)

    def table(self, ids: Ids, columns: list[str] | None = None) -> pa.Table:
        """Return the metadata of ids (n,), in their order."""
        return self._searcher.table(ids, columns)


class VectorRows(IndexRows):
    """The rows of an open index with their vectors.

    `exact` says whether the vectors are exact, and `origin` describes, for messages, where they come from. Vectors from
    OUT take the memory of one index shard's vectors, as float16.
    """

    def __init__(self, searcher: Searcher) -> None:
        super().__init__(searcher)
        self._sources: dict[int, Embeddings] = {}
        self._held: dict[tuple[str, str], Half] = {}
        self.exact, self.origin = True, "of INDEX, exact"
        if self.manifest.rerank or set(self.manifest.key.values()) <= {"Flat"}:
            return
        try:
            self._sources = {source: self._open(source) for source in {shard.source for shard in self.manifest.shards}}
            self.origin = "of OUT, exact"
        except (ClipBatchError, OSError) as error:
            kept = ", ".join(self.manifest.key.values())
            self.exact = False
            self.origin = f"as the index keeps them ({kept}), not exact, for OUT cannot be read: {error}"

    def vectors(self, ids: Ids) -> dict[str, Vectors]:
        """Return unit vectors float32 (n, d) of ids (n,) by modality; zero for a row without a vector."""
        if not self._sources:
            return {modality: self._searcher.reconstruct(ids, modality) for modality in self.manifest.key}
        out = {modality: np.empty((len(ids), self.manifest.dim), dtype=np.float32) for modality in self.manifest.key}
        owner = np.searchsorted([shard.offset for shard in self.manifest.shards], ids, "right") - 1
        for number in np.unique(owner):
            mine = np.flatnonzero(owner == number)
            for modality, vectors in out.items():
                vectors[mine] = unit(self._read(self.manifest.shards[number], ids[mine], modality))
        return out

    def _read(self, shard: IndexShard, ids: Ids, modality: str) -> Half:
        """Return vectors float16 (n, d) of ids (n,) of one index shard, from OUT. CorruptError: one is not unit."""
        source = self._sources[shard.source]
        matrix = Outputs((source,))  # an OUT may have no captions beside one that has
        if len(ids) <= FEW:
            with ThreadPoolExecutor(16) as pool:
                rows = self._source_rows(source, ids).tolist()
                few = list(pool.map(lambda row: matrix.read_vectors(modality, row, row + 1), rows))
            return np.concatenate([np.empty((0, source.dim), dtype=np.float16), *few])
        held = self.ids(shard.offset, shard.offset + shard.rows)
        if (shard.name, modality) not in self._held:
            self._held = {key: half for key, half in self._held.items() if key[0] == shard.name}
            places = self._source_rows(source, held)
            order = np.argsort(places)
            vectors = np.empty((len(held), source.dim), dtype=np.float16)
            vectors[order] = matrix.gather(modality, places[order])
            self._held[shard.name, modality] = vectors
        return self._held[shard.name, modality][np.searchsorted(held, ids)]

    def _source_rows(self, source: Embeddings, ids: Ids) -> Ids:
        """Return the rows int64 (n,) of OUT from which the index's rows `ids` (n,) were merged."""
        starts = {commit.partition: start for commit, start in zip(source.commits, source.starts, strict=False)}
        partitions, rows = (self.table(ids, [name])[name].to_numpy() for name in LINEAGE)
        numbers, inverse = np.unique(partitions, return_inverse=True)
        source_rows: Ids = np.array([starts[int(number)] for number in numbers], dtype=np.int64)[inverse] + rows
        return source_rows

    def _open(self, number: int) -> Embeddings:
        """Open an OUT of the index. ConfigError: it is not recorded. CorruptError: it has changed since the merge."""
        if number >= len(self.manifest.sources):
            raise ConfigError("the index does not record it")
        origin = self.manifest.sources[number]
        store = Store(origin.output, self._searcher.storage.storage_options)
        source = open_source(store, self.manifest.encoder, allow_partial=True)
        known = {one.commit for one in read_source(self._searcher.store, origin)}
        same = known <= set(map(commit_digest, source.commits)) if origin.held else digest(source) == origin.digest
        if not same:  # an OUT that has only grown is read as it was
            raise CorruptError(f"{store.url} has changed since it was merged")
        return source
