"""One index shard: its rows in the order of their lists, indexed, with metadata, and searched by held-out queries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clip_batch.embeddings.reader import blocks
from clip_batch.index import metadata_writer
from clip_batch.index.ann import faiss_index, recall
from clip_batch.index.ann.libfaiss import Index
from clip_batch.index.ann.predictor import Predictor
from clip_batch.index.ann.rows import Ordered
from clip_batch.index.merge import predict, trial
from clip_batch.index.merge.attempt import Attempt
from clip_batch.index.merge.queries import Queries
from clip_batch.index.merge.train import REFERENCE, Template
from clip_batch.index.paths import VersionPaths
from clip_batch.storage import npy

if TYPE_CHECKING:
    import pyarrow as pa

Ids = npt.NDArray[np.int64]
Half = npt.NDArray[np.float16]
Vectors = npt.NDArray[np.float32]


def build(template: Template, shard: int, attempt: Attempt) -> None:
    """Check the shard's rows, write its indices, metadata and recall trials, and commit the attempt.

    Vectors and metadata are written while the index is filled and searched. Memory: the shard's float16 vectors of one
    kind and one index (`MergeJob.row_bytes` a row).
    """
    started, job, names = time.monotonic(), template.job, VersionPaths()
    name, (start, stop) = job.shard_name(shard), job.bounds(shard)
    captionless = job.source.read_captionless(start, stop)
    queries, trials = template.queries(), dict[str, Any]()
    order: Ids | None = None
    with ThreadPoolExecutor(1, "write") as background:
        for modality in sorted(template.keys, key=lambda modality: modality != template.order_modality):
            vectors = job.source.read_vectors(modality, start, stop)
            job.source.check_rows(modality, start, vectors, captionless)
            lists, writing = None, []
            if order is None:
                order, lists = _order(template, shard, vectors)
                tables = partial(job.source.read_metadata, start, stop)
                writing.append(
                    background.submit(attempt.write, names.metadata(name), partial(_metadata, tables, order))
                )
            rows = Ordered(vectors, order)
            if template.rerank:
                writing.append(background.submit(attempt.write, names.vectors(modality, name), rows.save))
            index = _fill(template.index(modality), rows, lists)
            attempt.write(names.index(modality, name), partial(_index, index))
            located = _located(queries, modality, start, stop - start, order)
            first = job.base.effort[modality] if job.base else None
            shards = job.shards + (len(job.base.shards) if job.base else 0)
            predictors = _by_query_kind(template.read_predictors(modality), queries)
            tried = trial.run(
                index, rows, located, predictors, template.rerank, job.config.recall_target, first, shards
            )
            if predictors:
                trials[predict.sizes(modality)] = faiss_index.list_sizes(index)
            for kind, one in tried.items():
                trials.update(recall.arrays(one, f"{modality}.{kind}"))
            for written in writing:
                written.result()
            del vectors, rows, index, writing  # before the next one is read
    assert order is not None
    attempt.write(names.truth(name), lambda file: np.savez(file, **trials))
    attempt.commit(rows=len(order), seconds=time.monotonic() - started)


def _by_query_kind(predictors: Mapping[str, Predictor], queries: Queries) -> dict[str, Predictor]:
    """The predictor for each kind of queries that has one, the index's own queries' kinds among them."""
    own = {kind: kind.removeprefix(REFERENCE) for kind in queries}
    return {kind: predictors[name] for kind, name in own.items() if name in predictors}


def _metadata(tables: Callable[[], Iterator[pa.Table]], order: Ids, file: IO[bytes]) -> None:
    metadata_writer.write_ordered(tables(), order, file.name)


def _index(index: Index, file: IO[bytes]) -> None:
    faiss_index.write(index, file.name)


def _order(template: Template, shard: int, vectors: Half) -> tuple[Ids, Ids]:
    """The shard's rows (n,) sorted by list, stable, and their lists (n,); rows that are left out are in neither."""
    assign = template.assigner()
    lists = np.concatenate([assign(npy.unit(vectors[block]))[:, 0] for block in blocks(len(vectors))])
    order: Ids = np.argsort(lists, kind="stable")
    left_out = template.left_out(*template.job.bounds(shard))
    order = order[~np.isin(order, left_out)] if len(left_out) else order
    return order, lists[order]


def _fill(template: Index, rows: Ordered, lists: Ids | None) -> Index:
    """The template filled with rows (n, d), ids 0 to n - 1; zero rows (no caption) are left out.

    `lists` (n,) are those of the rows, if they are known.
    """
    lists = lists if faiss_index.has_lists(template) else None
    filled = [npy.filled(rows[block]) for block in blocks(len(rows))]
    index = template if all(block.all() for block in filled) else faiss_index.with_ids(template)
    for block, some in zip(blocks(len(rows)), filled, strict=True):
        their_lists = None if lists is None else lists[block][some]
        faiss_index.add(index, npy.unit(rows[block][some]), block.start + np.flatnonzero(some), their_lists)
    return index


def _located(queries: Queries, modality: str, start: int, rows: int, order: Ids) -> dict[str, tuple[Vectors, Ids]]:
    """Unit vectors (q, d) of the queries by kind, and which row (q,) of the index each is itself.

    -1 where it is a row of another shard, is left out, or is of another modality: a caption's row is no image's.
    """
    places = np.full(rows, -1)
    places[order] = np.arange(len(order))
    located = {}
    for kind, (own, vectors) in queries.items():
        inside = (own >= start) & (own < start + rows) & (kind == modality)
        located[kind] = npy.unit(vectors), np.where(inside, places[np.where(inside, own - start, 0)], -1)
    return located
