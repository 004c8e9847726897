"""embed: the uncommitted partitions of a slot, from tar to commit, in one pipeline that never drains.

    read (this thread, ahead) -> decode (pool, in order) -> encode (a thread, two for a GPU) -> write (this thread)

At most `_BATCHES_AHEAD` batches are in flight, whatever the size of a partition.
"""

from __future__ import annotations

import os
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from clip_batch import encoders
from clip_batch.config import EmbedConfig, StorageConfig, parse_bytes
from clip_batch.embeddings.attempts import record_failure
from clip_batch.embeddings.commits import committed
from clip_batch.embeddings.metadata import metadata_row
from clip_batch.embeddings.part_writer import PartWriter
from clip_batch.embeddings.spare import spare
from clip_batch.embeddings.workers import WorkerRun, recorded
from clip_batch.encoders.device import cores, pick_device, torch_threads, use_torch_threads
from clip_batch.errors import ClipBatchError, DecodeError, PartitionFailed, PlanError, Preempted
from clip_batch.plan import paths
from clip_batch.plan.plan import load_plan
from clip_batch.samples import read_slice
from clip_batch.samples.decode import decode_caption, decode_json
from clip_batch.samples.prefetch import Prefetcher
from clip_batch.storage.store import Store
from clip_batch.types import SHARD_REASONS, Failure, Partition, Plan, Sample, Slice, StrPath

if TYPE_CHECKING:
    from clip_batch.encoders import Array, Encoder, Pixels

    Encoded = tuple["_Batch", Array | None, Array | None]

_MOST_TROUBLE = 3
"""Partitions in a row that fail for the machine's or the store's sake before a worker gives up."""

_BATCHES_AHEAD = 3
"""Batches read and decoded ahead of the one being encoded."""

_HANDFUL = 4
"""Samples that a thread is given at a time: to hand over each by itself costs a tenth of decoding it."""


@dataclass(frozen=True)
class Outcome:
    """What became of one partition: "committed", "lost" (another attempt was first) or "failed".

    `again` tells of a failure that lies with the machine or the store, not with the data: trying
    again, best elsewhere, may help.
    """

    partition: int
    state: str
    rows: int = 0
    failed: int = 0
    error: str = ""
    again: bool = False

    @property
    def line(self) -> str:
        """The outcome as one line of text."""
        counts = f"{self.rows:,} samples embedded, {self.failed:,} listed as failed"
        return f"partition {self.partition} {self.state}: {self.error or counts}"


@dataclass(frozen=True)
class _Decoded:
    row: dict[str, Any]
    pixels: Pixels
    warnings: list[str]


@dataclass
class _Batch:
    """Decoded samples of one partition on their way to the encoder; `last` ends the partition."""

    partition: int
    items: list[_Decoded | Failure]
    last: bool = False
    error: Exception | None = None


def embed(
    output: StrPath,
    config: EmbedConfig = EmbedConfig(),
    partitions: Iterable[int] | None = None,
    *,
    storage: StorageConfig = StorageConfig(),
    progress: Callable[[str], None] | None = None,
    run: WorkerRun | None = None,
    encoder: Encoder | None = None,
) -> list[Outcome]:
    """Embed and commit the given partitions (None: all) that are not committed yet; the outcome of each.

    A partition that fails is reported in its `Outcome`, and beside the commits, and the others go on; but after three
    in a row for which the data is not to blame, the rest is left to other workers and has no outcome. `progress` takes
    one line of text about each partition that ends. `encoder` is the plan's, where the process has loaded it already.
    Where `run.slot` is given, and unless `config.share` is off, other workers' partitions follow when these are done.

    Example: `embed("out", EmbedConfig(batch_size=64), progress=print)`.

    PlanError, EncoderError or ConfigError, before any work. Preempted once `run.stop` is set: everything committed so
    far is kept, and nothing is half done.
    """
    store = Store(os.fspath(output), storage.storage_options)
    plan = load_plan(store)
    wanted = list(range(len(plan.partitions))) if partitions is None else list(partitions)
    unknown = [number for number in wanted if not 0 <= number < len(plan.partitions)]
    if unknown:
        raise PlanError(f"partition {unknown[0]} does not exist: the plan has 0 to {len(plan.partitions) - 1}")
    done = committed(store)
    todo = [plan.partitions[number] for number in wanted if number not in done]
    if not todo:
        return []
    run = run or WorkerRun()
    run.total = len(todo)
    encoder = encoder or encoders.load(plan.encoder, config.device, storage.storage_options, compiled_size(config))
    gpus = 0 if pick_device(config.device) == "cpu" else 1
    with recorded(store, run, gpus):
        return _Worker(store, plan, config, storage, run, encoder, progress or (lambda line: None)).embed(todo)


def batch_size(config: EmbedConfig) -> int:
    """Images of a forward pass."""
    return config.batch_size or (32 if pick_device(config.device) == "cpu" else 256)


def compiled_size(config: EmbedConfig) -> int:
    """Images of a batch that the encoder is compiled for, as `encoders.load` takes it; 0: it is not."""
    return batch_size(config) if config.compile else 0


class _Order:
    """Partitions in the order in which they are read, then what `more` gives, until that is None.

    Those that nobody has come to yet may change their order.
    """

    def __init__(self, todo: list[Partition], more: Callable[[], Partition | None]) -> None:
        self._todo, self._more, self._reached = list(todo), more, 0
        self._lock = threading.Lock()  # one thread reads, another fetches ahead of it

    def __iter__(self) -> Iterator[Partition]:
        place = 0
        while (partition := self._at(place)) is not None:
            yield partition
            place += 1

    def _at(self, place: int) -> Partition | None:
        with self._lock:
            if place == len(self._todo):
                if (found := self._more()) is None:
                    return None
                self._todo.append(found)
            self._reached = max(self._reached, place + 1)
            return self._todo[place]

    def elsewhere(self) -> None:
        """Go on from a random place, because another worker was met here.

        Workers that drain one plan in one order would else compute the same partitions side by side
        to its end, and the slower one lose each.
        """
        with self._lock:
            rest = self._todo[self._reached :]
            if rest:
                place = random.randrange(len(rest))
                self._todo[self._reached :] = rest[place:] + rest[:place]


class _Worker:
    """One process's encoder and threads, for as many partitions as it is given."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        config: EmbedConfig,
        storage: StorageConfig,
        run: WorkerRun,
        encoder: Encoder,
        progress: Callable[[str], None],
    ) -> None:
        self.store, self.plan, self.config, self.storage = store, plan, config, storage
        self.run, self.encoder, self.progress = run, encoder, progress
        self.abandoned: set[int] = set()
        self.tried: set[int] = set()
        self.batch_size = batch_size(config)
        self.prefetch = parse_bytes(config.prefetch)

    def embed(self, todo: list[Partition]) -> list[Outcome]:
        threads = self.config.threads or cores()
        self.tried.update(partition.id for partition in todo)
        outcomes: list[Outcome] = []
        order = _Order(todo, self._spare)
        files = Prefetcher(self._slices(order), self.storage.storage_options, self.prefetch, self.run.stop)
        team = torch_threads()
        # Decoding fills the cores by itself. A GPU gets its next batch while it works on one; a CPU is full with one,
        # by as many threads as torch takes.
        lanes = 1 if pick_device(self.config.device) == "cpu" else 2
        decoders = ThreadPoolExecutor(threads, "decode", use_torch_threads, (1,))
        device = ThreadPoolExecutor(lanes, "encode", use_torch_threads, (team,))
        with decoders, device, files:
            try:
                encoded = self._encode(self._decode(order, files, decoders), device, lanes)
                for number, batches in _by_partition(encoded):
                    outcomes.append(self._write(number, batches))
                    self.progress(outcomes[-1].line)
                    self.run.running.discard(number)
                    self.run.partitions += 1
                    if outcomes[-1].state == "lost":
                        order.elsewhere()
                    if len(outcomes) >= _MOST_TROUBLE and all(one.again for one in outcomes[-_MOST_TROUBLE:]):
                        # A broken GPU or a full disk: what is left stays missing, for a sound worker.
                        error = f"{outcomes[-1].error}; {_MOST_TROUBLE} in a row like this: this worker gives up"
                        outcomes[-1] = replace(outcomes[-1], error=error)
                        break
            finally:
                decoders.shutdown(wait=False, cancel_futures=True)
                device.shutdown(wait=False, cancel_futures=True)
                use_torch_threads(team)  # for threads to come, which begin with the last count set
        return outcomes

    def _spare(self) -> Partition | None:
        """A partition of another worker's, if there is one to take."""
        if not (self.config.share and self.run.slot) or self.run.stop.is_set():
            return None
        number = spare(self.store, self.tried)
        if number is None:
            return None
        self.tried.add(number)
        self.run.total += 1
        self.run.running.add(number)
        self.run.write_now.set()  # before others look for one
        return self.plan.partitions[number]

    def _decode(self, order: _Order, files: Prefetcher, pool: ThreadPoolExecutor) -> Iterator[_Batch]:
        """Batches in order; the pool works up to `_BATCHES_AHEAD` batches before the consumer."""
        window: deque[tuple[_Batch, list[Future[list[_Decoded | Failure]]]]] = deque()
        for batch, samples in self._read(order, files):
            handfuls = [samples[at : at + _HANDFUL] for at in range(0, len(samples), _HANDFUL)]
            window.append((batch, [pool.submit(self._decode_some, handful) for handful in handfuls]))
            if len(window) > _BATCHES_AHEAD:
                yield _finish(*window.popleft())
        while window:
            yield _finish(*window.popleft())

    def _slices(self, order: _Order) -> Iterator[Slice]:
        """What is to be read, in order; passing over partitions that someone committed before we come to them."""
        for partition in order:
            if not self._committed(partition):
                yield from partition.slices

    def _committed(self, partition: Partition) -> bool:
        return self.store.exists(paths.commit(self.plan.name(partition.id)))

    def _read(self, order: _Order, files: Prefetcher) -> Iterator[tuple[_Batch, list[Sample | Failure]]]:
        """Each partition's samples in batches; an infrastructure error ends only its own partition."""
        for partition in order:
            if self._committed(partition):
                self.run.running.discard(partition.id)
                order.elsewhere()
                continue
            self.run.running.add(partition.id)
            batch: list[Sample | Failure] = []
            error: Exception | None = None
            try:
                for piece in partition.slices:
                    for item in read_slice(piece, self.plan, self.storage.storage_options, files):
                        batch.append(item)
                        if len(batch) == self.batch_size:
                            yield _Batch(partition.id, []), batch
                            batch = []
            except Preempted:
                raise
            except (ClipBatchError, OSError) as caught:
                error = caught
            yield _Batch(partition.id, [], last=True, error=error), batch

    def _decode_some(self, samples: list[Sample | Failure]) -> list[_Decoded | Failure]:
        return [sample if isinstance(sample, Failure) else self._decode_one(sample) for sample in samples]

    def _decode_one(self, sample: Sample) -> _Decoded | Failure:
        try:
            assert sample.image is not None
            pixels = self.encoder.preprocess(sample.image, self.config.max_pixels)
        except DecodeError as error:
            return Failure(sample.key, sample.shard, sample.offset, error.reason, error.message)
        caption, warnings = decode_caption(sample.caption)
        values, more = decode_json(sample.json)
        row = metadata_row(sample, caption, values, self.plan.fields)
        return _Decoded(row, pixels, warnings + more)

    def _encode(self, batches: Iterator[_Batch], device: ThreadPoolExecutor, lanes: int) -> Iterator[Encoded]:
        """Encodes as many batches as there are lanes while this thread collects the next; in order."""
        waiting: deque[Future[Encoded]] = deque()
        for batch in batches:
            if self.run.stop.is_set():
                raise Preempted()
            waiting.append(device.submit(self._forward, batch))
            if len(waiting) > lanes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _forward(self, batch: _Batch) -> Encoded:
        """The batch with its image and text vectors; a failure here is its partition's, not the worker's."""
        import numpy as np

        good = [item for item in batch.items if isinstance(item, _Decoded)]
        if not good or batch.partition in self.abandoned:
            return batch, None, None
        try:
            pixels, captions = np.stack([item.pixels for item in good]), [item.row["caption"] for item in good]
            return batch, *encoders.encode_pairs(self.encoder, pixels, captions)
        except (ClipBatchError, RuntimeError) as error:
            batch.error = error
            return batch, None, None

    def _write(self, number: int, batches: Iterator[Encoded]) -> Outcome:
        """Write and commit one partition; consumes its batches whatever happens."""
        try:
            with PartWriter(self.store, self.plan, number, self.encoder.dim, self.config.compression) as writer:
                for batch, images, texts in batches:
                    if batch.error:
                        raise batch.error
                    self._add(writer, batch, images, texts)
                failed = sum(writer.failed.values())
                self._check_policy(writer)
                commit = writer.commit(self.plan.encoder.fingerprint)
                if commit:
                    self.run.committed.append(commit)
                return Outcome(number, "committed" if commit else "lost", writer.rows, failed)
        except Preempted:
            raise
        except (ClipBatchError, OSError, RuntimeError) as error:
            self.abandoned.add(number)
            for _ in batches:
                pass
            return self._record(number, error)

    def _add(self, writer: PartWriter, batch: _Batch, images: Array | None, texts: Array | None) -> None:
        good = [item for item in batch.items if isinstance(item, _Decoded)]
        bad = [item for item in batch.items if isinstance(item, Failure)]
        for failure in bad:
            writer.fail(failure)
        if good:
            assert images is not None
            writer.add([item.row for item in good], images, texts)
            writer.warnings.update(warning for item in good for warning in item.warnings)
        self.run.samples += len(good)
        self.run.failed += len(bad)

    def _check_policy(self, writer: PartWriter) -> None:
        broken = {reason: count for reason, count in writer.failed.items() if reason in SHARD_REASONS}
        if broken and self.config.broken_shard == "fail":
            raise PartitionFailed(f"broken shards {broken} and broken_shard is fail: mend them, or allow record")
        bad = sum(writer.failed.values()) - sum(broken.values())
        share = bad / max(bad + writer.rows, 1)
        if share > self.config.max_bad_share:
            raise PartitionFailed(
                f"{bad} of {bad + writer.rows} samples failed {dict(writer.failed)}, more than "
                f"max_bad_share {self.config.max_bad_share}: mend the shards, or raise it"
            )

    def _record(self, number: int, error: Exception) -> Outcome:
        """Leave word of a failed attempt for `status`; the partition stays uncommitted."""
        message = f"{type(error).__name__}: {error}"
        try:
            record_failure(self.store, self.plan, number, message)
        except OSError as second:
            message += f" (and it could not be recorded: {second})"
        return Outcome(
            number, "failed", error=message, again=isinstance(error, OSError) or not isinstance(error, ClipBatchError)
        )


def _finish(batch: _Batch, futures: list[Future[list[_Decoded | Failure]]]) -> _Batch:
    batch.items = [item for future in futures for item in future.result()]
    return batch


def _by_partition(encoded: Iterator[Encoded]) -> Iterator[tuple[int, Iterator[Encoded]]]:
    """Split the one stream at the batches that end a partition; each part must be consumed in full."""
    for first in encoded:
        yield first[0].partition, _until_last(first, encoded)


def _until_last(first: Encoded, rest: Iterator[Encoded]) -> Iterator[Encoded]:
    item = first
    yield item
    while not item[0].last:
        item = next(rest)
        yield item
