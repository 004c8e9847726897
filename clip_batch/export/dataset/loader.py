"""Batches from worker processes, by torch's DataLoader, with what it does not carry: progress and failures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from clip_batch.export.dataset.failures import Failures
from clip_batch.export.dataset.progress import PassProgress

T = TypeVar("T")


Read = Callable[[list[list[int]], list[int], int, Failures], Iterator[dict[str, Any]]]
"""`FilteredDataset.read`."""


class Loader:
    """Batches of a FilteredDataset, whose `loader` makes this; each iteration is a pass, with workers of its own.

    Worker w of W has every W-th row from the w-th on, so the last batches may be smaller. After each batch the
    dataset's `state_dict` stands behind it, and its `failures` have what the workers met. `options` are DataLoader's:
    pin_memory, prefetch_factor, multiprocessing_context, ... A worker that dies is a RuntimeError, as in DataLoader.
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
        self.batch_size, self.workers = batch_size, workers
        self._read, self._rows, self._progress = read, rows, progress
        self._drop_last, self._collate, self._options = drop_last, collate, options

    def __len__(self) -> int:
        """Batches of a whole pass, if no row fails."""
        workers, more = max(1, self.workers), 0 if self._drop_last else self.batch_size - 1
        shares = [len(range(worker, self._rows, workers)) for worker in range(workers)]
        return sum((share + more) // self.batch_size for share in shares)

    def __iter__(self) -> Iterator[Any]:
        over, gone = self._progress.begin(max(1, self.workers))
        first, form = self._progress.next, (self.batch_size, self._drop_last, self._collate)
        batches = _Batches(self._read, over, [*gone], first, *form)
        for mark, batch in DataLoader(batches, batch_size=None, num_workers=self.workers, **self._options):
            self._progress.advance(mark.worker, mark.gone, mark.failures)
            if batch is not None:
                yield batch
        self._progress.finish()


class _Mark(NamedTuple):
    """How far a worker is behind a batch, and what failed since the one before."""

    worker: int
    gone: int
    failures: Failures


class _Batches(IterableDataset[tuple[_Mark, Any]]):
    """One worker's batches, each with its mark; behind the last one a mark alone.

    DataLoader asks its first worker first: `first` is whose turn it is here, so that a pass that goes on from a
    state gives its batches in the order in which they would have come.
    """

    def __init__(
        self,
        read: Read,
        over: list[list[int]],
        gone: list[int],
        first: int,
        size: int,
        drop_last: bool,
        collate: Callable[[list[dict[str, Any]]], Any],
    ) -> None:
        super().__init__()
        self._read, self._over, self._gone, self._first = read, over, gone, first
        self._size, self._drop_last, self._collate = size, drop_last, collate

    def __iter__(self) -> Iterator[tuple[_Mark, Any]]:
        info = get_worker_info()
        worker = ((info.id if info else 0) + self._first) % len(self._gone)
        failures = Failures()
        samples = self._read(self._over, self._gone, worker, failures)
        told = failures.copy()

        def mark() -> _Mark:
            nonlocal told
            new, told = failures.since(told), failures.copy()
            return _Mark(worker, self._gone[worker], new)

        while len(batch := list(islice(samples, self._size))) == self._size:
            yield mark(), self._collate(batch)
        yield mark(), self._collate(batch) if batch and not self._drop_last else None


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples as one dict: tensors of one shape stacked, numbers as a tensor (n,), anything else as a list of n."""
    return {name: _joined([sample[name] for sample in samples]) for name in samples[0]}


def _joined(values: list[Any]) -> Any:
    if all(isinstance(value, torch.Tensor) and value.shape == values[0].shape for value in values):
        return default_collate(values)
    return torch.tensor(values) if all(isinstance(value, (int, float)) for value in values) else values


def together(batches: Iterable[T]) -> Iterator[T]:
    """The batches of this rank, up to where the first of all ranks has no more: as many on each.

    Call it on every rank of torch.distributed's default group. What longer ranks have left, some rows, is not
    trained on in this epoch. One small all-reduce a batch; without a group, the batches as they are.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        yield from batches
        return
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    own = iter(batches)
    while True:
        batch = next(own, None)
        there = torch.tensor(int(batch is not None), device=device)
        distributed.all_reduce(there, distributed.ReduceOp.MIN)
        if batch is None or not there:
            return
        yield batch
