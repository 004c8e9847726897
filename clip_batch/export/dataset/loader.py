"""Batches of a dataset from the worker processes of torch's DataLoader, with the workers' progress and failures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from clip_batch.errors import ConfigError
from clip_batch.export.dataset.failures import Failures
from clip_batch.export.dataset.progress import PassProgress

T = TypeVar("T")

Read = Callable[[list[list[int]], list[int], int, Failures], Iterator[dict[str, Any]]]
"""The type of `FilteredDataset.read`."""


class Loader:
    """Batches of a FilteredDataset; `FilteredDataset.loader` returns one.

    Each iteration is a pass with new worker processes. Worker w of W reads every W-th row from the w-th on, so the last
    batches may be smaller. After each batch, the dataset's `state_dict` resumes behind it, and its `failures` include
    those of the workers. `options` are passed to DataLoader: pin_memory, prefetch_factor, multiprocessing_context, ...
    RuntimeError: a worker died, as in DataLoader.
    """

    def __init__(
        self,
        read: Read,
        rows: int,
        progress: PassProgress,
        batch_size: int,
        workers: int,
        drop_last: bool,
        collate: Callable[[list[dict[str, Any]]], Any],
        options: dict[str, Any],
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}: it must be a whole number, {least} or more")
        self.batch_size, self.workers = batch_size, workers
        self._read, self._rows, self._progress = read, rows, progress
        self._drop_last, self._collate, self._options = drop_last, collate, options

    def __len__(self) -> int:
        """Return the number of batches of a whole pass in which no row fails."""
        workers, round_up = max(1, self.workers), 0 if self._drop_last else self.batch_size - 1
        shares = [len(range(worker, self._rows, workers)) for worker in range(workers)]
        return sum((share + round_up) // self.batch_size for share in shares)

    def __iter__(self) -> Iterator[Any]:
        over, positions_read = self._progress.begin(max(1, self.workers))
        first, form = self._progress.next, (self.batch_size, self._drop_last, self._collate)
        batches = _Batches(self._read, over, [*positions_read], first, *form)
        for mark, batch in DataLoader(batches, batch_size=None, num_workers=self.workers, **self._options):
            self._progress.advance(mark.worker, mark.positions_read, mark.failures)
            if batch is not None:
                yield batch
        self._progress.finish()


class _Mark(NamedTuple):
    """How many positions a worker has read after a batch, and the rows that failed since the batch before."""

    worker: int
    positions_read: int
    failures: Failures


class _Batches(IterableDataset[tuple[_Mark, Any]]):
    """The batches of one worker, each with its mark. The last batch may be None, with a mark alone.

    DataLoader always begins with its first worker. `first` is the worker whose batch is next, and takes that place, so
    a resumed pass yields its batches in the order in which the interrupted one would have.
    """

    def __init__(
        self,
        read: Read,
        over: list[list[int]],
        positions_read: list[int],
        first: int,
        size: int,
        drop_last: bool,
        collate: Callable[[list[dict[str, Any]]], Any],
    ) -> None:
        super().__init__()
        self._read, self._over, self._positions_read, self._first = read, over, positions_read, first
        self._size, self._drop_last, self._collate = size, drop_last, collate

    def __iter__(self) -> Iterator[tuple[_Mark, Any]]:
        info = get_worker_info()
        worker = ((info.id if info else 0) + self._first) % len(self._positions_read)
        failures = Failures()
        samples = self._read(self._over, self._positions_read, worker, failures)
        reported = failures.copy()

        def mark() -> _Mark:
            nonlocal reported
            new, reported = failures.since(reported), failures.copy()
            return _Mark(worker, self._positions_read[worker], new)

        while len(batch := list(islice(samples, self._size))) == self._size:
            yield mark(), self._collate(batch)
        yield mark(), self._collate(batch) if batch and not self._drop_last else None


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return n samples as one dict: tensors of one shape stacked, numbers as a tensor (n,), other values as a list."""
    return {name: _joined([sample[name] for sample in samples]) for name in samples[0]}


def _joined(values: list[Any]) -> Any:
    if all(isinstance(value, torch.Tensor) and value.shape == values[0].shape for value in values):
        return default_collate(values)
    return torch.tensor(values) if all(isinstance(value, (int, float)) for value in values) else values


def together(batches: Iterable[T]) -> Iterator[T]:
    """Yield this rank's batches until some rank has no more, so that every rank yields equally many.

    Call it on every rank of torch.distributed's default group. The few rows that longer ranks have left are not trained
    on in this epoch. Each batch costs one small all-reduce. Without a group, all batches are yielded.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        yield from batches
        return
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    remaining = iter(batches)
    while True:
        batch = next(remaining, None)
        everywhere = torch.tensor(int(batch is not None), device=device)
        distributed.all_reduce(everywhere, distributed.ReduceOp.MIN)
        if batch is None or not everywhere:
            return
        yield batch
