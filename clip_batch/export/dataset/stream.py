"""FilteredDataset: the rows of a selection as samples, in this process or in a DataLoader's workers.

A pass reads metadata TAKE rows at a time, and threads fetch and decode a bounded number of rows ahead of the consumer.
Samples come in the order of `deal`, so the state of a pass is a few numbers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import distributed
from torch.utils.data import IterableDataset, get_worker_info

from clip_batch.config import SearchConfig, StorageConfig, parse_bytes
from clip_batch.config.paths import path_text
from clip_batch.encoders.device import cores, use_torch_threads
from clip_batch.errors import ConfigError, DecodeError
from clip_batch.export.dataset import deal
from clip_batch.export.dataset.failures import Failed, Failures
from clip_batch.export.dataset.fetch import Fetch, Lost, Place
from clip_batch.export.dataset.loader import Loader, collate
from clip_batch.export.dataset.pictures import Decode, pictures
from clip_batch.export.dataset.progress import PassProgress
from clip_batch.export.dataset.select import PLACE, select
from clip_batch.index.metadata import MetadataFile
from clip_batch.search.conditions import all_of
from clip_batch.search.query import Query
from clip_batch.search.where import Where, as_condition
from clip_batch.storage.paths import absolute
from clip_batch.types import StrPath

TAKE = 256
"""Rows whose metadata is read at a time."""

RUN = 16
"""Rows that one task of a thread reads from local tars. From other places a task reads one row."""

REMOTE_THREADS = 32
"""Threads that read when each read waits for a network."""

Row = dict[str, Any]


class FilteredDataset(IterableDataset[Row]):
    """Samples of the rows that queries find. Each row comes once per epoch over all ranks and workers.

    `source` is an INDEX, or the folder that `clip-batch filter` wrote, which takes no queries. A query is a text or
    a Query; `amount` is the number of rows in all, mixed by the queries' weights (see `select.mix`). `where` and
    `unique` narrow every query. A sample is a dict: id, score, query (its number), key, caption (or None), `columns`,
    and image (see `pictures` for `decode`, `size`, `max_pixels`, `upright` and `transform`, which runs on the reading
    threads).

    `via` says where images come from: "tar", "url" or "either" (see `fetch`). `timeout` in seconds, `max_bytes`, and
    `private`, which allows addresses that are not public, apply to URLs. Each process reads with `threads` threads
    (0: its share of the cores, or 32 where reads wait for a network), at most `ahead` rows before they are consumed.
    `shuffle` is by `seed` and epoch, in blocks of `block` rows that are neighbours in their tars (see `deal`). `rank`
    and `world` default to those of torch.distributed if it is initialized, otherwise to RANK and WORLD_SIZE.
    `selection` names a local folder that keeps the selection: the first process writes it and the others open it.
    Several ranks need it.

    `failures` has the rows of the current pass that gave no sample. InputError: their share exceeds `max_failures`
    (0 to 1). ConfigError: an argument is wrong, or no row was found. Other errors: those of `Searcher`.
    """

    def __init__(
        self,
        source: StrPath,
        queries: str | Query | Sequence[str | Query] = (),
        *,
        amount: int | None = None,
        columns: Sequence[str] = (),
        decode: Decode = "tensor",
        size: int = 224,
        transform: Callable[[Any], Any] | None = None,
        max_pixels: int = 50_000_000,
        upright: bool = False,
        via: str = "tar",
        timeout: float = 10.0,
        max_bytes: str = "20MB",
        private: bool = False,
        threads: int = 0,
        ahead: int = 256,
        shuffle: bool = True,
        seed: int = 0,
        block: int = 64,
        rank: int | None = None,
        world: int | None = None,
        selection: StrPath = "",
        max_failures: float = 0.5,
        where: Where | None = None,
        unique: bool = False,
        storage: StorageConfig = StorageConfig(),
        search: SearchConfig = SearchConfig(),
    ) -> None:
        super().__init__()
        StorageConfig.expect(storage=storage), SearchConfig.expect(search=search)
        if via not in ("tar", "url", "either"):
            raise ConfigError(f"via is {via!r}: there are tar, url and either")
        for name, value in (("ahead", ahead), ("block", block), ("amount", 1 if amount is None else amount)):
            if value < 1:
                raise ConfigError(f"{name} is {value}: it must be 1 or more")
        if isinstance(columns, str):
            raise ConfigError(f"columns is {columns!r}: it must be a list of names")
        self.rank, self.world = _rank(rank, world)
        self.columns, self.shuffle, self.seed, self.block = list(columns), shuffle, seed, block
        self._decoding: Callable[[], Callable[[bytes], Any]] = partial(
            pictures, decode, size, max_pixels, transform, upright
        )
        self._decoding()
        self._fetching = partial(Fetch, via, storage.storage_options, timeout, parse_bytes(max_bytes), private)
        self._threads, self._ahead, self.progress = threads, ahead, PassProgress(max_failures)
        given = [queries] if isinstance(queries, (str, Query)) else queries
        narrowed = [_narrowed(Query(text=one) if isinstance(one, str) else one, where, unique) for one in given]
        if self.world > 1 and not selection and narrowed:
            raise ConfigError(
                f"{self.world} ranks must not each search for themselves: name a selection folder that all can reach"
            )
        if not selection:
            temporary = tempfile.mkdtemp(prefix="clip-batch-")
            weakref.finalize(self, _remove, temporary, os.getpid())
            selection = os.path.join(temporary, "selection")
        home = absolute(path_text(selection, "selection"))
        self.selection = select(path_text(source, "source"), narrowed, amount, via, self.columns, home, storage, search)
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # persistent workers see it change

    def __repr__(self) -> str:
        return f"<FilteredDataset of {len(self):,} rows: epoch {self.epoch}, rank {self.rank} of {self.world}>"

    def __len__(self) -> int:
        """Return the number of rows of this rank in an epoch. Each row that fails gives one sample less."""
        start, stop = deal.share(self.selection.rows, self.rank, self.world)
        return stop - start

    @property
    def failures(self) -> Failures:
        """The rows of the current pass that gave no sample."""
        return self.progress.failures

    @property
    def epoch(self) -> int:
        """The epoch of the next pass, or of the current one."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be of this epoch. It begins at the start, unless a state of the same epoch was loaded."""
        if epoch != self.epoch:
            self._epoch.fill_(epoch)
            self.progress.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the state behind the sample, or the loader's batch, that was yielded last; JSON can hold it."""
        return {**self._identity(), "epoch": self.epoch, **self.progress.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass resume at a state. ConfigError: it is of other rows, another order or another rank."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ConfigError(f"the state has {name} {state.get(name)}, this dataset {value}: make it as it was")
        self._epoch.fill_(state["epoch"])
        self.progress.resume(state)

    def _identity(self) -> dict[str, Any]:
        """Return the settings without which the numbers of a state mean nothing."""
        names = ("rank", "world", "shuffle", "seed", "block")
        return {"selection": self.selection.digest, **{name: getattr(self, name) for name in names}}

    def loader(
        self,
        batch_size: int = 64,
        workers: int = 0,
        drop_last: bool = False,
        collate: Callable[[list[Row]], Any] = collate,
        **options: Any,
    ) -> Loader:
        """Return batches from worker processes, whose progress and failures this dataset knows. See `Loader`."""
        return Loader(self.read, len(self), self.progress, batch_size, workers, drop_last, collate, options)

    def __iter__(self) -> Iterator[Row]:
        """Begin a pass over the samples of this process; in a DataLoader's worker, over its share of them.

        The first pass after `load_state_dict` resumes at that state, any other begins at the start. From then on,
        `state_dict` describes the new pass.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        over, positions_read = self.progress.begin(workers)
        return self.read(over, positions_read, worker, self.failures)

    def read(self, over: deal.Phases, positions_read: list[int], worker: int, failures: Failures) -> Iterator[Row]:
        """Yield one worker's remaining samples of a pass, and keep `positions_read` and `failures` up to date."""
        workers, seed = len(positions_read), self.seed if self.shuffle else None
        rows = deal.epoch_rows(self.selection.rows, seed, self.epoch, self.block, self.rank, self.world)
        mine = rows[deal.left(len(rows), over)[worker::workers][positions_read[worker] :]]
        del rows
        fetch, decode = self._fetching(), self._decoding()

        def load(run: list[Row]) -> list[Row | Failed]:
            return [_sample(row, fetch, decode, self.columns) for row in run]

        threads = self._threads or (max(1, cores() // workers) if self.selection.local else REMOTE_THREADS)
        pool = ThreadPoolExecutor(threads, "dataset", use_torch_threads, (1,))
        try:
            for sample in _ahead(pool, load, self._runs(mine), self._ahead):
                positions_read[worker] += 1
                failures.rows += 1
                if isinstance(sample, Failed):
                    failures.add(sample)
                    failures.check(self.progress.max_failures)
                else:
                    yield sample
        finally:
            fetch.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if workers == 1:
            failures.check(self.progress.max_failures, least=1)

    def _runs(self, rows: deal.Rows) -> Iterator[list[Row]]:
        """Yield the metadata of the rows, in lists of which each is one task."""
        table = MetadataFile(self.selection.path)
        size = min(RUN, self._ahead) if self.selection.local else 1
        for start in range(0, len(rows), TAKE):
            taken = table.take(rows[start : start + TAKE]).to_pylist()
            for first in range(0, len(taken), size):
                yield taken[first : first + size]


def _narrowed(query: Query, where: Where | None, unique: bool) -> Query:
    """Return a query that must also meet the dataset's condition."""
    condition = all_of([query.condition, as_condition(where)])
    return replace(query, where=condition, unique=query.unique or unique)


def _sample(row: Row, fetch: Fetch, decode: Callable[[bytes], Any], columns: Sequence[str]) -> Row | Failed:
    """Return a row as a sample, with its image in place of those columns of its place that are not in `columns`."""
    place = Place(row["key"], **{name: row.get(name) for name in PLACE})
    for name in PLACE:
        if name not in columns:
            row.pop(name, None)
    try:
        row["image"] = decode(fetch(place))
    except (Lost, DecodeError) as error:
        return Failed(row["id"], row["key"], error.reason, str(error))
    return row


def _ahead(
    pool: ThreadPoolExecutor, load: Callable[[list[Row]], list[Row | Failed]], runs: Iterator[list[Row]], most: int
) -> Iterator[Row | Failed]:
    """Yield the results of loading the runs in threads, in order. At most `most` rows are loading or waiting."""
    window: deque[tuple[int, Future[list[Row | Failed]]]] = deque()
    held = 0
    for run in runs:
        while window and held + len(run) > most:
            size, oldest = window.popleft()
            yield from oldest.result()
            held -= size
        window.append((len(run), pool.submit(load, run)))
        held += len(run)
    while window:
        yield from window.popleft()[1].result()


def _rank(rank: int | None, world: int | None) -> tuple[int, int]:
    """Return this process's rank, and the number of processes that train together. ConfigError: they do not fit."""
    if rank is None and world is None:
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank is None or world is None or not 0 <= rank < world:
        raise ConfigError(f"rank {rank} of world {world}: give both, rank from 0 to world - 1")
    return rank, world


def _remove(folder: str, process: int) -> None:
    """Remove a folder, unless this is a process that was forked from `process`."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
