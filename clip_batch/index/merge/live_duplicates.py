"""Finds the rows of OUT that repeat a row of the version that they are added to, by searches of its index shards.

An index with lists is asked for the rows of the nearest lists (`VISITS`), a flat one for all. What it answers is
compared by the vectors themselves: those stored for re-ranking, those that the index holds (Flat), or those of the OUT
that the rows came from. Where all three are gone a row of the index is not compared: its codes prove nothing.

Rows that were removed are compared too, so that what somebody had taken out does not come back under another name; rows
that newer ones of their source replaced are not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clip_batch.embeddings.outputs import Outputs
from clip_batch.embeddings.reader import BLOCK, Embeddings, Rows
from clip_batch.errors import ClipBatchError
from clip_batch.index import held
from clip_batch.index.ann import faiss_index, faiss_search
from clip_batch.index.ann.libfaiss import Index
from clip_batch.index.ann.order import best
from clip_batch.index.manifest import IndexShard, Manifest, MergedOutput
from clip_batch.index.merge import duplicate_report
from clip_batch.index.merge.duplicates import BELOW_ONE, DOUBT, Duplicates, Flags
from clip_batch.index.merge.job import digest, open_source
from clip_batch.index.metadata import MetadataFile
from clip_batch.index.removed_rows import contains
from clip_batch.storage import npy
from clip_batch.storage.npy import Half, Vectors
from clip_batch.storage.store import Store

VISITS = 8
"""Lists of the index that are searched for each row, more than within OUT, as only one of both rows visits others."""

DEPTH = 16
"""Rows of the index that each new row is compared with exactly: those that the codes show to be nearest."""

ROWS = 1 << 19
"""New rows that are searched for at a time: about 500 bytes each, and their vectors in blocks."""

EQUAL = 1e-5
"""How far numbers of equal vectors may be apart, relatively: float16 tells numbers apart that differ by 5e-4."""


@dataclass(frozen=True)
class LiveRows:
    """The rows of the version that is added to, as far as they are compared.

    `removed` and `replaced` are sorted ids: see `clip_batch.index.removed_rows`.
    """

    index: Store
    base: Manifest
    modality: str
    removed: Rows
    replaced: Rows
    _sources: dict[int, Embeddings | None] = field(default_factory=dict)

    def indices(self) -> Iterator[tuple[Index, int, int]]:
        """Each index file, opened: (index, the id of its first row, its number of rows)."""
        rest = self.base.rows
        for shard in self.base.shards:
            name = self.base.paths(shard).index(self.modality, shard.name)
            if name in self.base.files:
                rest -= shard.rows
                with self.index.fetch(name) as path:
                    yield faiss_index.read(path, mapped=True), shard.offset, shard.rows
        if joined := self.base.single.get(self.modality):
            with self._joined(sorted(joined)) as path:
                yield faiss_index.read(path, mapped=True), 0, rest

    @contextlib.contextmanager
    def _joined(self, names: list[str]) -> Iterator[str]:
        """A local path of an index in several files, which lie side by side."""
        if self.index.local:
            yield self.index.path(names[0])
            return
        with tempfile.TemporaryDirectory(prefix="clip-batch-") as folder:
            paths = [os.path.join(folder, os.path.basename(name)) for name in names]
            for name, path in zip(names, paths, strict=True):
                with self.index.open(name) as file, open(path, "wb") as copy:
                    shutil.copyfileobj(file, copy, 1 << 20)
            yield paths[0]

    def effort(self, index: Index) -> int | None:
        """The effort of the searches."""
        return VISITS if faiss_index.has_lists(index) else self.base.effort[self.modality]

    @contextlib.contextmanager
    def stored(self, shard: IndexShard) -> Iterator[Half | None]:
        """The float16 vectors (rows, d) of an index shard, memory-mapped; None if the index keeps none."""
        name = self.base.paths(shard).vectors(self.modality, shard.name)
        if name not in self.base.files:
            yield None
            return
        with self.index.fetch(name) as path:
            yield npy.open_matrix(path)

    @property
    def keeps_vectors(self) -> bool:
        """Whether all index shards have their vectors stored."""
        names = (self.base.paths(shard).vectors(self.modality, shard.name) for shard in self.base.shards)
        return all(name in self.base.files for name in names)

    def vectors_of_output(self, shard: IndexShard, rows: Rows) -> Vectors:
        """The unit vectors (n, d) of some rows (n,) of an index shard, from their OUT; NaN where it lacks them."""
        vectors = np.full((len(rows), self.base.dim), np.nan, dtype=np.float32)
        if (source := self._source(shard.source)) is not None:
            table = self.metadata(shard, rows, ["partition", "row"])
            first = dict(zip((commit.partition for commit in source.commits), source.starts, strict=False))
            starts = np.array([first.get(number, -1) for number in table["partition"].to_pylist()], dtype=np.int64)
            known = np.flatnonzero(starts >= 0)
            of_rows = starts[known] + table["row"].to_numpy().astype(np.int64)[known]
            ascending, back = np.unique(of_rows, return_inverse=True)
            if len(known):
                vectors[known] = npy.unit(source.gather(self.modality, ascending)[back])
        return vectors

    def _source(self, number: int) -> Embeddings | None:
        """The parts of an OUT of the version that are as they were when they were merged; None if it cannot be opened.

        It may have got more parts since. Of an older version only an OUT that is unchanged as a whole counts.
        """
        if number not in self._sources:
            self._sources[number] = None
            with contextlib.suppress(ClipBatchError, OSError):
                self._sources[number] = self._unchanged(held.origin(self.base, number))
        return self._sources[number]

    def _unchanged(self, origin: MergedOutput | None) -> Embeddings | None:
        if origin is None:
            return None
        source = open_source(Store(origin.output, self.index.options), self.base.encoder, allow_partial=True)
        if not origin.held:
            return source if digest(source) == origin.digest else None
        merged = {(one.partition, one.commit) for one in held.read_source(self.index, origin)}
        return source.only([one for one in source.commits if (one.partition, held.commit_digest(one)) in merged])

    def metadata(self, shard: IndexShard, rows: Rows, columns: list[str] | None = None) -> pa.Table:
        """The metadata of some rows (n,) of an index shard."""
        with self.index.fetch(self.base.paths(shard).metadata(shard.name)) as path:
            return MetadataFile(path).take(rows, columns)

    def describe(self, ids: Rows) -> pa.Table:
        """The columns of the report on ids (n,), ascending."""
        pieces = []
        for shard in self.base.shards:
            own = ids[slice(*np.searchsorted(ids, [shard.offset, shard.offset + shard.rows]))]
            if len(own):
                origin = held.origin(self.base, shard.source)
                table = self.metadata(shard, own - shard.offset)
                pieces.append(duplicate_report.named(table, origin.output if origin else None))
        return pa.concat_tables(pieces)

    def excluded(self, offset: int, rows: int) -> faiss_search.Removed | None:
        """The rows of an index file that are not compared."""
        own = self.replaced[slice(*np.searchsorted(self.replaced, [offset, offset + rows]))] - offset
        return faiss_search.Removed(own) if len(own) else None


class Pairs(NamedTuple):
    """New rows (m,), the ids (m,) of rows of the index, and their cosines (m,): 1 if equal, NaN where not known."""

    rows: Rows
    ids: Rows
    scores: npt.NDArray[np.float64]

    def at(self, places: Rows | Flags) -> Pairs:
        """Some of the pairs, in the order of `places`."""
        return Pairs(self.rows[places], self.ids[places], self.scores[places])


Take = Callable[[Rows], Vectors]
"""Unit vectors (n, d) of some new rows (n,), ascending."""

Blocks = Callable[[], Iterator[tuple[Rows, Vectors]]]
"""New rows (n,), and their unit vectors (n, d), some at a time."""


def find(
    source: Outputs, live: LiveRows, threshold: float, without: Rows, progress: Callable[[str], None]
) -> tuple[Duplicates, int]:
    """The rows of OUT that repeat a row of the index, except those in `without`; and of how many this is not known.

    Of several repeated rows the nearest is named, and one that was removed only where no other is repeated. The index
    is read once for each `ROWS` rows of OUT, and OUT once for each index file.
    """
    kind, found, unknown = live.modality, list[Pairs](), 0

    def take(rows: Rows) -> Vectors:
        return npy.unit(source.gather(kind, rows))

    for start in range(0, source.rows, ROWS):
        stop = min(start + ROWS, source.rows)
        pairs = exact(live, take, search(live, partial(_blocks, source, kind, start, stop, without), threshold))
        unknown += len(np.unique(pairs.rows[np.isnan(pairs.scores)]))
        found.append(_nearest(live, pairs, threshold))
        progress(f"searched the index for {stop:,} of {source.rows:,} rows")
    rows, ids = (np.concatenate([pairs[column] for pairs in found]).astype(np.int64) for column in (0, 1))
    scores = np.concatenate([pairs.scores for pairs in found])
    return Duplicates(rows, ids, scores.astype(np.float32), np.ones(len(rows), dtype=np.bool_)), unknown


def _blocks(source: Outputs, kind: str, start: int, stop: int, without: Rows) -> Iterator[tuple[Rows, Vectors]]:
    """The rows among [start, stop) that have a vector and are not in `without`, which is sorted."""
    for low in range(start, stop, BLOCK):
        data = source.read_vectors(kind, low, min(low + BLOCK, stop))
        some = np.flatnonzero(npy.filled(data))
        some = some[~contains(without, low + some)]
        if len(some):
            yield low + some, npy.unit(data[some])


def search(live: LiveRows, blocks: Blocks, threshold: float, depth: int = DEPTH, whole: bool = False) -> Pairs:
    """The `depth` rows of the index nearest to each new row, unless they cannot reach the threshold; not compared yet.

    With `whole` all lists are searched.
    """
    rows = np.concatenate([np.empty(0, dtype=np.int64), *(rows for rows, _ in blocks())])
    scores = np.full((len(rows), depth), -np.inf, dtype=np.float32)
    ids = np.full((len(rows), depth), -1, dtype=np.int64)
    for index, offset, count in live.indices():
        effort = faiss_index.lists(index) if whole else live.effort(index)
        least = threshold - DOUBT if faiss_index.is_exact(index) else -np.inf
        at, excluded = 0, live.excluded(offset, count)
        for own, vectors in blocks():
            place = slice(at, at := at + len(own))
            more, places = faiss_search.search(index, vectors, min(depth, count), effort, excluded)
            none = (places < 0) | (more < least)
            more, places = np.where(none, -np.inf, more), np.where(none, -1, places + offset)
            both = np.hstack([scores[place], more]), np.hstack([ids[place], places])
            scores[place], ids[place] = best(*both, depth)
    places, columns = np.nonzero(ids >= 0)
    return Pairs(rows[places], ids[places, columns], np.full(len(places), np.nan))


def exact(live: LiveRows, take: Take, pairs: Pairs) -> Pairs:
    """The same pairs, by ascending id, with their cosines; NaN where the vector of the index's row is gone."""
    rows, ids, scores = pairs = pairs.at(np.argsort(pairs.ids, kind="stable"))

    def compare(low: int, high: int, vectors: Callable[[Rows], Vectors]) -> None:
        for start in range(low, high, BLOCK):
            part = slice(start, min(start + BLOCK, high))
            theirs = vectors(ids[part])
            ascending, back = np.unique(rows[part], return_inverse=True)
            scores[part] = cosines(take(ascending)[back], theirs)

    def ends(offset: int, count: int) -> tuple[int, int]:
        low, high = np.searchsorted(ids, [offset, offset + count]).tolist()
        return low, high

    left = []
    for shard in live.base.shards:
        low, high = ends(shard.offset, shard.rows)
        if low < high:
            with live.stored(shard) as stored:
                if stored is None:
                    left.append(shard)
                else:
                    compare(low, high, partial(_of_stored, stored, shard.offset))
    for index, offset, count in live.indices() if left else ():
        low, high = ends(offset, count)
        if low < high and faiss_index.is_exact(index):
            compare(low, high, partial(_of_index, index, offset))
    for shard in left:
        low, high = ends(shard.offset, shard.rows)
        if np.isnan(scores[low:high]).all():
            compare(low, high, partial(_of_output, live, shard))
    return pairs


def _of_stored(stored: Half, offset: int, ids: Rows) -> Vectors:
    return npy.unit(stored[ids - offset])


def _of_index(index: Index, offset: int, ids: Rows) -> Vectors:
    return faiss_index.reconstruct_all(index, ids - offset)


def _of_output(live: LiveRows, shard: IndexShard, ids: Rows) -> Vectors:
    return live.vectors_of_output(shard, ids - shard.offset)


def cosines(mine: Vectors, theirs: Vectors) -> npt.NDArray[np.float64]:
    """The cosine (m,) of each pair of unit vectors (m, d), in float64: 1 if they are equal, and less otherwise."""
    scores: npt.NDArray[np.float64] = np.minimum(np.sum(mine.astype(np.float64) * theirs, axis=1), BELOW_ONE)
    scores[np.all(np.abs(mine - theirs) <= EQUAL * np.abs(mine), axis=1)] = 1
    return scores


def _nearest(live: LiveRows, pairs: Pairs, threshold: float) -> Pairs:
    """One pair for each row that has any at the threshold: of rows that are not removed, if there are, the nearest."""
    pairs = pairs.at(pairs.scores >= threshold)
    pairs = pairs.at(np.lexsort((pairs.ids, -pairs.scores, contains(live.removed, pairs.ids), pairs.rows)))
    first = np.ones(len(pairs.rows), dtype=np.bool_)
    first[1:] = pairs.rows[1:] != pairs.rows[:-1]
    return pairs.at(first)
