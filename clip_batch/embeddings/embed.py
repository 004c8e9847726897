"""embed: from tars to commits, for the uncommitted partitions of a worker, in one pipeline that stays full.

    read (this thread) -> decode (a pool) -> encode (one thread on a CPU, two on a GPU) -> write (this thread)

Batches keep their order. At most `_BATCHES_AHEAD` of them wait to be encoded, whatever the size of a partition.
"""

from __future__ import annotations

import contextlib
import gc
import reprlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from clip_batch import encoders
from clip_batch.config import EmbedConfig, StorageConfig, parse_bytes
from clip_batch.config.paths import path_text
from clip_batch.embeddings.attempts import record_failure
from clip_batch.embeddings.commits import committed
from clip_batch.embeddings.decoders import Decoders
from clip_batch.embeddings.loading import are_many, batch_size, load_encoder
from clip_batch.embeddings.metadata import metadata_row
from clip_batch.embeddings.part_writer import PartWriter
from clip_batch.embeddings.partition_queue import PartitionQueue
from clip_batch.embeddings.renewal import Renewal
from clip_batch.embeddings.slabs import Slab, Slabs
from clip_batch.embeddings.spare import spare
from clip_batch.embeddings.workers import WorkerRun, recorded
from clip_batch.encoders.device import LANES, pick_device, torch_threads, use_torch_threads
from clip_batch.encoders.encoder import NO_TEXT
from clip_batch.errors import (
    ClipBatchError,
    ConfigError,
    DecodeError,
    EncoderError,
    PartitionFailed,
    PlanError,
    Preempted,
)
from clip_batch.plan import paths
from clip_batch.plan.plan import load_plan
from clip_batch.plan.replace import check_digest
from clip_batch.samples import read_slice
from clip_batch.samples.prefetch import Prefetcher
from clip_batch.samples.texts import decode_texts
from clip_batch.storage.names import is_utf8, text_name
from clip_batch.storage.store import Store
from clip_batch.types import (
    SHARD_REASONS,
    UNREADABLE,
    Failure,
    Item,
    Partition,
    PassedOver,
    Plan,
    Sample,
    Slice,
    StrPath,
    counted,
)

if TYPE_CHECKING:
    from clip_batch.encoders.encoder import Array, Model

    Encoded = tuple["_Batch", Array | None, Array | None]

_MOST_RETRYABLE = 3
"""A worker gives up after this many partitions in a row that failed because of the machine or the store."""

_BATCHES_AHEAD = 3
"""Batches that are read and decoded ahead of the one that is being encoded."""

_CHUNK = 4
"""Least number of samples that are handed to a decoding thread at a time: each hand-over costs a tenth of decoding."""

_CHUNKS = 32
"""A large batch is handed over in this many pieces, enough for all threads."""


@dataclass(frozen=True)
class Outcome:
    """What became of one partition; "lost" means that another attempt committed it first.

    `rows` and `failed` count samples, `passed_over` counts files that are part of neither, by extension, and `warnings`
    counts rows by what was wrong with them. `again` says that the machine or the store failed, not the data, so that
    another attempt, preferably on another machine, may succeed. `empty` says why the partition was committed without a
    row, and `hint` how to plan so that more of it is embedded; "" otherwise.
    """

    partition: int
    state: Literal["committed", "lost", "failed"]
    rows: int = 0
    failed: int = 0
    error: str = ""
    again: bool = False
    passed_over: dict[str, int] = field(default_factory=dict)
    warnings: dict[str, int] = field(default_factory=dict)
    empty: str = ""
    hint: str = ""

    @property
    def line(self) -> str:
        """The outcome as one line of text."""
        counts = f"{counted(self.rows, 'sample')} embedded, {self.failed:,} listed as failed"
        counts += f"; {self.hint}" if self.hint else ""
        return f"partition {self.partition} {self.state}: {self.error or self.empty or counts}"


@dataclass(frozen=True)
class _Decoded:
    """A sample that is ready to be encoded: its metadata row, its place in the slab, and what was mended in it."""

    row: dict[str, Any]
    place: int
    warnings: list[str]


_Ready = _Decoded | Failure | PassedOver
"""What becomes of an item that was read."""

_Placed = int | Failure | PassedOver
"""What becomes of an item's image: its place in the slab, or what is listed or counted in its stead."""


class _Texts(NamedTuple):
    """What becomes of a sample's texts: its metadata row, what was mended in them, and why it cannot be embedded."""

    row: dict[str, Any]
    warnings: list[str]
    failure: Failure | None = None


@dataclass
class _Batch:
    """Decoded samples of one partition on their way to the encoder; `last` ends the partition."""

    partition: int
    slab: Slab
    items: list[_Ready] = field(default_factory=list)
    last: bool = False
    error: Exception | None = None


class _Decoding(NamedTuple):
    """A batch that is being decoded: all its texts at once, its images in chunks."""

    batch: _Batch
    texts: Future[list[_Texts]]
    images: list[Future[list[_Placed]]]

    def done(self) -> bool:
        """Whether all is decoded."""
        return self.texts.done() and all(future.done() for future in self.images)

    def finish(self) -> _Batch:
        """The batch with its decoded items, once they are all decoded."""
        places = chain.from_iterable(future.result() for future in self.images)
        self.batch.items = [
            texts.failure or (_Decoded(texts.row, place, texts.warnings) if isinstance(place, int) else place)
            for texts, place in zip(self.texts.result(), places, strict=True)
        ]
        return self.batch


def _numbers(partitions: Iterable[int]) -> list[int]:
    """The numbers of partitions. ConfigError: it is no list of whole numbers."""
    numbers = list(partitions) if isinstance(partitions, Iterable) else None
    if numbers is None or not all(isinstance(number, Integral) for number in numbers):
        raise ConfigError(f"partitions is {reprlib.repr(partitions)}: give a list of numbers, such as [0, 1]")
    return numbers


def embed(
    output: StrPath,
    config: EmbedConfig = EmbedConfig(),
    partitions: Iterable[int] | None = None,
    *,
    storage: StorageConfig = StorageConfig(),
    progress: Callable[[str], None] | None = None,
    run: WorkerRun | None = None,
    encoder: Model | None = None,
    renew: Mapping[int, Renewal] | None = None,
) -> list[Outcome]:
    """Embed and commit the given partitions (None: all) that are not committed yet; the outcome of each.

    A partition that fails is reported in its `Outcome`, and beside the commits, and the others go on; but after three
    in a row for which the data is not to blame, the rest is left to other workers and has no outcome. `progress` takes
    one line of text about each partition that ends. `encoder` is the plan's, where the process has loaded it already.
    Where `run.slot` is given, and unless `config.share` is off, other workers' partitions follow when these are done.
    `renew` has those of the given partitions that are committed and are embedded again, by their numbers; the commit
    of one counts until the new one takes its place.

    Example: `embed("out", EmbedConfig(batch_size=64), progress=print)`.

    PlanError, EncoderError or ConfigError, before any work; PlanError also where the plan was replaced meanwhile.
    Preempted once `run.stop` is set: everything committed so far is kept, and nothing is half done.
    """
    EmbedConfig.expect(config=config), StorageConfig.expect(storage=storage)
    store = Store(path_text(output, "output"), storage.storage_options)
    plan = load_plan(store)
    numbers = list(range(len(plan.partitions))) if partitions is None else _numbers(partitions)
    unknown = [number for number in numbers if not 0 <= number < len(plan.partitions)]
    if unknown:
        raise PlanError(f"partition {unknown[0]} does not exist: the plan has 0 to {len(plan.partitions) - 1}")
    renew = renew or {}
    done = committed(store) - {*renew}
    todo = [
        renew[number].partition if number in renew else plan.partitions[number]
        for number in numbers
        if number not in done
    ]
    if not todo:
        return []
    run = run or WorkerRun()
    run.total = len(todo)
    encoder = encoder or load_encoder(plan.encoder, config, storage.storage_options, are_many(plan, todo))
    if not (encoder.has_text or "image" in plan.modalities):
        raise EncoderError(f"captions alone were planned, and {NO_TEXT}")
    gpus = 0 if pick_device(config.device) == "cpu" else 1
    with recorded(store, run, gpus), _frozen_heap():
        say = progress or (lambda line: None)
        return _Worker(store, plan, config, storage, run, encoder, say, renew).embed(todo)


@contextlib.contextmanager
def _frozen_heap() -> Iterator[None]:
    """Leave all objects of now out of garbage collections: torch has 400,000, and every thread waits meanwhile."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Worker:
    """One process's encoder and threads, which embed partitions one after another."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        config: EmbedConfig,
        storage: StorageConfig,
        run: WorkerRun,
        encoder: Model,
        progress: Callable[[str], None],
        renew: Mapping[int, Renewal],
    ) -> None:
        self.store, self.plan, self.config, self.storage = store, plan, config, storage
        self.run, self.encoder, self.progress, self.renew = run, encoder, progress, renew
        self.abandoned: set[int] = set()
        self.tried: set[int] = set()
        self.batch_size = batch_size(config)
        self.slabs = Slabs(self.batch_size, pick_device(config.device))
        self.decoders = Decoders(config.threads)
        self.encoding: deque[Future[Encoded]] = deque()
        self.prefetch = parse_bytes(config.prefetch)
        self.images, self.captions = ("image" in plan.modalities), ("text" in plan.modalities)

    def embed(self, todo: list[Partition]) -> list[Outcome]:
        self.tried.update(partition.id for partition in todo)
        outcomes: list[Outcome] = []
        queue = PartitionQueue(todo, self._spare)
        files = Prefetcher(self._slices(queue), self.storage.storage_options, self.prefetch, self.run.stop)
        forward_threads = torch_threads()
        # A GPU is given its next batch while it computes one; on a CPU, one batch keeps all of torch's threads busy.
        lanes = 1 if pick_device(self.config.device) == "cpu" else LANES
        device = ThreadPoolExecutor(lanes, "encode", use_torch_threads, (forward_threads,))
        with self.decoders, device, files:
            try:
                encoded = self._encode(self._decode(queue, files), device, lanes)
                for number, batches in _by_partition(encoded):
                    outcomes.append(self._write(number, batches))
                    self.progress(outcomes[-1].line)
                    self.run.running.discard(number)
                    self.run.partitions += 1
                    if outcomes[-1].state == "lost":
                        queue.jump()
                    if len(outcomes) >= _MOST_RETRYABLE and all(one.again for one in outcomes[-_MOST_RETRYABLE:]):
                        # A broken GPU or a full disk: the other partitions stay missing, for other workers.
                        error = f"{outcomes[-1].error}; {_MOST_RETRYABLE} in a row like this: this worker gives up"
                        outcomes[-1] = replace(outcomes[-1], error=error)
                        break
            finally:
                self.decoders.cancel()
                device.shutdown(wait=False, cancel_futures=True)
                use_torch_threads(forward_threads)  # new threads start with the last count that was set
        return outcomes

    def _spare(self) -> Partition | None:
        """A partition of another worker, if there is one to take and sharing is on."""
        if not (self.config.share and self.run.slot) or self.run.stop.is_set():
            return None
        number = spare(self.store, self.tried, len(self.plan.partitions))
        if number is None:
            return None
        self.tried.add(number)
        self.run.total += 1
        self.run.running.add(number)
        self.run.write_now.set()  # so that no other worker takes it too
        return self.plan.partitions[number]

    def _decode(self, queue: PartitionQueue, files: Prefetcher) -> Iterator[_Batch]:
        """Decode samples in a pool, up to `_BATCHES_AHEAD` batches ahead of the consumer; batches keep their order."""
        window: deque[_Decoding] = deque()
        for batch, items in self._read(queue, files):
            texts = self.decoders.submit(self._decode_texts, items)
            size = max(_CHUNK, self.batch_size // _CHUNKS)
            chunks = [items[at : at + size] for at in range(0, len(items), size)]
            images = [self.decoders.submit(self._decode_images, chunk, batch.slab) for chunk in chunks]
            window.append(_Decoding(batch, texts, images))
            if len(window) > _BATCHES_AHEAD:
                yield self._finish(window.popleft())
        while window:
            yield self._finish(window.popleft())

    def _finish(self, decoding: _Decoding) -> _Batch:
        """A batch once it is decoded; another thread decodes from now on if the encoder had to wait for it."""
        late = not decoding.done()
        batch = decoding.finish()
        if late and self.encoding and all(future.done() for future in self.encoding):
            self.decoders.widen()
        return batch

    def _slices(self, queue: PartitionQueue) -> Iterator[Slice]:
        """The slices to prefetch, in order, without those of partitions that are committed by now."""
        for partition in queue:
            if not self._committed(partition):
                yield from (piece for piece in partition.slices if piece.shard.etag != UNREADABLE)

    def _committed(self, partition: Partition) -> bool:
        """Whether any worker has committed a partition by now, and it is not to be embedded again."""
        return partition.id not in self.renew and self.store.exists(paths.commit(self.plan.name(partition.id)))

    def _read(self, queue: PartitionQueue, files: Prefetcher) -> Iterator[tuple[_Batch, list[Item]]]:
        """Read the samples of each partition in batches. An error ends only the partition in which it occurs."""
        for partition in queue:
            if self._committed(partition):
                self.run.running.discard(partition.id)
                queue.jump()
                continue
            self.run.running.add(partition.id)
            batch: list[Item] = []
            error: Exception | None = None
            try:
                for piece in partition.slices:
                    for item in read_slice(piece, self.plan, self.storage.storage_options, files):
                        batch.append(item)
                        if len(batch) == self.batch_size:
                            yield _Batch(partition.id, self.slabs.take()), batch
                            batch = []
            except Preempted:
                raise
            except (ClipBatchError, OSError) as caught:
                error = caught
            yield _Batch(partition.id, self.slabs.take(), last=True, error=error), batch

    def _decode_texts(self, items: list[Item]) -> list[_Texts]:
        """The texts of each sample; empty ones of other items. A batch's at once take half the time."""
        return [self._decode_text(item) if isinstance(item, Sample) else _Texts({}, []) for item in items]

    def _decode_text(self, sample: Sample) -> _Texts:
        caption, values, warnings = decode_texts(sample, self.plan.caption_field)
        names = [] if is_utf8(text_name(sample.key)) else ["name_not_utf8"]
        failure = None
        if caption is None and not self.images:
            message = "no caption, or a blank one, and only captions are embedded"
            failure = Failure(sample.key, sample.shard, sample.offset, "missing_caption", message)
        return _Texts(metadata_row(sample, caption, values, self.plan.fields), names + warnings, failure)

    def _decode_images(self, items: list[Item], slab: Slab) -> list[_Placed]:
        return [self._decode_image(item, slab) if isinstance(item, Sample) else item for item in items]

    def _decode_image(self, sample: Sample, slab: Slab) -> int | Failure:
        if not self.images:
            return 0
        try:
            assert sample.image is not None
            return slab.add(self.encoder.preprocess(sample.image, self.config.max_pixels))
        except DecodeError as error:
            return Failure(sample.key, sample.shard, sample.offset, error.reason, error.message)

    def _encode(self, batches: Iterator[_Batch], device: ThreadPoolExecutor, lanes: int) -> Iterator[Encoded]:
        """Encode up to `lanes` batches at once, while this thread collects the next; batches keep their order."""
        waiting = self.encoding
        for batch in batches:
            if self.run.stop.is_set():
                raise Preempted()
            waiting.append(device.submit(self._forward, batch))
            if len(waiting) > lanes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _forward(self, batch: _Batch) -> Encoded:
        """The batch with its image and text vectors, None and None after an error, which fails only its partition."""
        decoded = [item for item in batch.items if isinstance(item, _Decoded)]
        try:
            if not decoded or batch.partition in self.abandoned:
                return batch, None, None
            places = [item.place for item in decoded] if self.images else list(range(len(decoded)))
            captions: list[str | None] = [None] * len(decoded)
            for place, item in zip(places, decoded, strict=True):
                captions[place] = item.row["caption"]
            pixels = batch.slab.pixels(len(decoded)) if self.images else None
            vectors = encoders.encode_pairs(
                self.encoder, pixels, captions if self.captions else None, self.plan.encoder.precision
            )
            images, texts = (None if one is None else one[places] for one in vectors)
            return batch, images, texts
        except (ClipBatchError, RuntimeError) as error:
            batch.error = error
            return batch, None, None
        finally:
            self.slabs.give(batch.slab)

    def _write(self, number: int, batches: Iterator[Encoded]) -> Outcome:
        """Write and commit one partition. All its batches are consumed even if it fails."""
        try:
            with PartWriter(self.store, self.plan, number, self.encoder.dim, self.config.compression) as writer:
                for batch, images, texts in batches:
                    if batch.error:
                        raise batch.error
                    self._add(writer, batch, images, texts)
                failed = sum(writer.failed.values())
                self._check_policy(writer)
                check_digest(self.store, self.plan, number)
                commit = writer.commit(self.plan.encoder.fingerprint, self.renew.get(number))
                if commit is None:
                    return Outcome(number, "lost", writer.rows, failed)
                self.run.committed.append(commit)
                return Outcome(
                    number,
                    "committed",
                    writer.rows,
                    failed,
                    passed_over=commit.passed_over,
                    warnings=commit.warnings,
                    empty=commit.empty,
                    hint=writer.hint(),
                )
        except (Preempted, PlanError):
            raise
        except (ClipBatchError, OSError, RuntimeError) as error:
            self.abandoned.add(number)
            for _ in batches:
                pass
            return self._record(number, error)

    def _add(self, writer: PartWriter, batch: _Batch, images: Array | None, texts: Array | None) -> None:
        """Write the rows and the failures of a batch."""
        decoded = [item for item in batch.items if isinstance(item, _Decoded)]
        failures = [item for item in batch.items if isinstance(item, Failure)]
        for failure in failures:
            writer.fail(failure)
        for item in batch.items:
            if isinstance(item, PassedOver):
                writer.passed_over.update(item.files)
        if decoded:
            writer.add([item.row for item in decoded], images, texts)
            writer.warnings.update(warning for item in decoded for warning in item.warnings)
        self.run.samples += len(decoded)
        self.run.failed += len(failures)

    def _check_policy(self, writer: PartWriter) -> None:
        """PartitionFailed if more samples or shards failed than the config allows."""
        broken = {reason: count for reason, count in writer.failed.items() if reason in SHARD_REASONS}
        if broken and self.config.broken_shard == "fail":
            raise PartitionFailed(f"broken shards {broken} and broken_shard is fail: mend them, or allow record")
        samples_failed = sum(writer.failed.values()) - sum(broken.values())
        samples = samples_failed + writer.rows
        if samples_failed / max(samples, 1) > self.config.max_bad_share:
            raise PartitionFailed(
                f"{samples_failed} of {samples} samples failed {dict(writer.failed)}, more than "
                f"max_bad_share {self.config.max_bad_share}: mend the shards, or raise it"
            )

    def _record(self, number: int, error: Exception) -> Outcome:
        """Record a failed attempt for `status`, and return its outcome; the partition stays uncommitted."""
        message = f"{type(error).__name__}: {error}"
        try:
            record_failure(self.store, self.plan, number, message)
        except OSError as second:
            message += f" (and it could not be recorded: {second})"
        again = isinstance(error, OSError) or not isinstance(error, ClipBatchError)
        return Outcome(number, "failed", error=message, again=again)


def _by_partition(encoded: Iterator[Encoded]) -> Iterator[tuple[int, Iterator[Encoded]]]:
    """Split the stream after the last batch of each partition; each part must be consumed before the next."""
    for first in encoded:
        yield first[0].partition, _until_last(first, encoded)


def _until_last(first: Encoded, rest: Iterator[Encoded]) -> Iterator[Encoded]:
    item = first
    yield item
    while not item[0].last:
        item = next(rest)
        yield item
