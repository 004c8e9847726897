"""FilteredDataset: the rows of a selection as samples, in this process or in a DataLoader's workers.

A pass takes metadata by the hundred, and threads fetch and decode a bounded window of rows ahead of whoever
consumes; samples come in the order of `deal`, so a state is a few numbers.
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

TAKE = 256
"""Rows whose metadata is read at once."""

RUN = 16
"""Rows of local tars that one task of a thread reads; of other places each is a task."""

REMOTE_THREADS = 32
"""Reads at once where each waits for a network."""

Row = dict[str, Any]


class FilteredDataset(IterableDataset[Row]):
    """Samples of the rows that queries find, each once an epoch over all ranks and workers.

    `source` is an INDEX, or the folder that `clip-batch filter` wrote (then without queries). A query is a text or
    a Query; `amount` is how many rows in all, mixed by the queries' weights (see `select.mix`). A sample is a dict:
    id, score, query (its number), key, caption (None where there is none), `columns`, and image (see
    `pictures` for `decode`, `size`, `max_pixels` and `transform`, which runs on the reading threads).

    `via` tells where images come from: "tar", "url", or "either" (see `fetch`; `timeout` in seconds, `max_bytes` and
    `private`, which allows addresses that are not public, are for URLs). `threads` of each process read (0: its
    share of the cores, or 32 where a network is waited for), `ahead` rows at the most before they are asked for.
    `shuffle` is by `seed` and epoch, in blocks of `block` rows that neighbour in their tars (see `deal`). `rank` and
    `world` are torch.distributed's if it is initialized, else RANK's and WORLD_SIZE's. `selection` names a local
    folder to keep the selection in: made by who comes first, opened by the others; it is needed for several ranks.

    Rows without a sample are in `failures`, of the pass at work; more than `max_failures` of them (0 to 1) raise
    InputError. ConfigError: a wrong argument, or no row is found. Other errors: as `Searcher`.
    """

    def __init__(
        self,
        source: str,
        queries: str | Query | Sequence[str | Query] = (),
        *,
        amount: int | None = None,
        columns: Sequence[str] = (),
        decode: Decode = "tensor",
        size: int = 224,
        transform: Callable[[Any], Any] | None = None,
        max_pixels: int = 50_000_000,
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
        selection: str = "",
        max_failures: float = 0.5,
        where: Where | None = None,
        unique: bool = False,
        storage: StorageConfig = StorageConfig(),
        search: SearchConfig = SearchConfig(),
    ) -> None:
        super().__init__()
        if via not in ("tar", "url", "either"):
            raise ConfigError(f"via is {via!r}: there are tar, url and either")
        for name, value in (("ahead", ahead), ("block", block), ("amount", 1 if amount is None else amount)):
            if value < 1:
                raise ConfigError(f"{name} is {value}: it must be 1 or more")
        self.rank, self.world = _rank(rank, world)
        self.columns, self.shuffle, self.seed, self.block = list(columns), shuffle, seed, block
        self._making: Callable[[], Callable[[bytes], Any]] = partial(pictures, decode, size, max_pixels, transform)
        self._making()
        self._fetching = partial(Fetch, via, storage.storage_options, timeout, parse_bytes(max_bytes), private)
        self._threads, self._ahead, self.progress = threads, ahead, PassProgress(max_failures)
        asked = [queries] if isinstance(queries, (str, Query)) else queries
        wanted = [_narrowed(Query(text=one) if isinstance(one, str) else one, where, unique) for one in asked]
        if self.world > 1 and not selection and wanted:
            raise ConfigError(
                f"{self.world} ranks must not each search for themselves: name a selection folder that all can reach"
            )
        if not selection:
            home = tempfile.mkdtemp(prefix="clip-batch-")
            weakref.finalize(self, _remove, home, os.getpid())
            selection = os.path.join(home, "selection")
        self.selection = select(source, wanted, amount, via, self.columns, absolute(selection), storage, search)
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # so that workers that stay alive see it

    def __repr__(self) -> str:
        return f"<FilteredDataset of {len(self):,} rows: epoch {self.epoch}, rank {self.rank} of {self.world}>"

    def __len__(self) -> int:
        """Rows of this rank in an epoch; samples are fewer by the failures."""
        start, stop = deal.share(self.selection.rows, self.rank, self.world)
        return stop - start

    @property
    def failures(self) -> Failures:
        """The rows of the pass at work that gave no sample."""
        return self.progress.failures

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be of this epoch: from its start, unless a state of this very epoch was loaded."""
        if epoch != self.epoch:
            self._epoch.fill_(epoch)
            self.progress.reset()

    def state_dict(self) -> dict[str, Any]:
        """Where the pass stands: behind the sample, or the loader's batch, that was given last. For JSON too."""
        return {**self._identity(), "epoch": self.epoch, **self.progress.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on from a state. ConfigError: it is of other rows, another order or rank."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ConfigError(f"the state has {name} {state.get(name)}, this dataset {value}: make it as it was")
        self._epoch.fill_(state["epoch"])
        self.progress.resume(state)

    def _identity(self) -> dict[str, Any]:
        """What a state's numbers rest on."""
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
        """Batches whose progress and failures this dataset knows, from so many worker processes. See `Loader`."""
        return Loader(self.read, len(self), self.progress, batch_size, workers, drop_last, collate, options)

    def __iter__(self) -> Iterator[Row]:
        """A pass over the samples of this process (of a DataLoader's worker, its part of them).

        From the loaded state on, once; else from the start. A new pass ends an older one's claim on `state_dict`.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        over, gone = self.progress.begin(workers)
        return self.read(over, gone, worker, self.failures)

    def read(self, over: deal.Phases, gone: list[int], worker: int, failures: Failures) -> Iterator[Row]:
        """The samples that are left to one worker of a pass; `gone` and `failures` are kept up to date."""
        workers, seed = len(gone), self.seed if self.shuffle else None
        rows = deal.epoch_rows(self.selection.rows, seed, self.epoch, self.block, self.rank, self.world)
        mine = rows[deal.left(len(rows), over)[worker::workers][gone[worker] :]]
        del rows
        fetch, making = self._fetching(), self._making()

        def load(run: list[Row]) -> list[Row | Failed]:
            return [_sample(row, fetch, making, self.columns) for row in run]

        threads = self._threads or (max(1, cores() // workers) if self.selection.local else REMOTE_THREADS)
        pool = ThreadPoolExecutor(threads, "dataset", use_torch_threads, (1,))
        try:
            for one in _ahead(pool, load, self._runs(mine), self._ahead):
                gone[worker] += 1
                failures.rows += 1
                if isinstance(one, Failed):
                    failures.add(one)
                    failures.check(self.progress.max_failures)
                else:
                    yield one
        finally:
            fetch.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if workers == 1:
            failures.check(self.progress.max_failures, least=1)

    def _runs(self, rows: deal.Rows) -> Iterator[list[Row]]:
        """The rows' metadata, a task's worth at a time."""
        table = MetadataFile(self.selection.path)
        size = min(RUN, self._ahead) if self.selection.local else 1
        for start in range(0, len(rows), TAKE):
            taken = table.take(rows[start : start + TAKE]).to_pylist()
            for first in range(0, len(taken), size):
                yield taken[first : first + size]


def _narrowed(query: Query, where: Where | None, unique: bool) -> Query:
    """A query with the dataset's own condition besides its own."""
    condition = all_of([query.condition, as_condition(where)])
    return replace(query, where=condition, unique=query.unique or unique)


def _sample(row: Row, fetch: Fetch, making: Callable[[bytes], Any], columns: Sequence[str]) -> Row | Failed:
    """A row of the selection as a sample: its image in the stead of where it is, unless those columns are wanted."""
    place = Place(row["key"], *(row.get(name) for name in PLACE))
    for name in PLACE:
        if name not in columns:
            row.pop(name, None)
    try:
        row["image"] = making(fetch(place))
    except (Lost, DecodeError) as error:
        return Failed(row["id"], row["key"], error.reason, str(error))
    return row


def _ahead(
    pool: ThreadPoolExecutor, load: Callable[[list[Row]], list[Row | Failed]], runs: Iterator[list[Row]], most: int
) -> Iterator[Row | Failed]:
    """What threads make of the runs, in order; `most` rows at once are at work, or done and waiting."""
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
    """This process's number among so many that train together."""
    if rank is None and world is None:
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank is None or world is None or not 0 <= rank < world:
        raise ConfigError(f"rank {rank} of world {world}: give both, rank from 0 to world - 1")
    return rank, world


def _remove(folder: str, process: int) -> None:
    """Not from a forked worker."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
