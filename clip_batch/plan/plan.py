"""The plan: which shards, in which partitions, by which encoder; frozen under OUT/_clip_batch.

`plan.parquet` has one row a slice and `plan.json` the rest; plan.json is written last and carries
the other's sha256, so that a plan is there whole or not at all. Neither is ever changed again.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from clip_batch.config import PlanConfig, StorageConfig, parse_bytes
from clip_batch.errors import ConfigError, CorruptError, PlanError
from clip_batch.plan import paths, specs
from clip_batch.plan.counts import count_folder, count_samples
from clip_batch.plan.pack import Cut, Split, nearest, pack, split_folder
from clip_batch.plan.schema import sample_fields
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec, Partition, Plan, Shard, Slice

FORMAT = 1

FILES_SAMPLES = 10_000
"""Samples of a partition with `--format files` where neither samples nor a count are asked for."""


Say = Callable[[str], None]


def make_plan(
    config: PlanConfig, output: str, storage: StorageConfig = StorageConfig(), progress: Say | None = None
) -> Plan:
    """Freeze a plan at `output`, or return the one that stands there if nothing differs.

    ConfigError: an option is wrong. InputError: an input is missing or named twice. EncoderError:
    the weights cannot be had. PlanError: another plan stands at `output`; it names the differences.
    """
    from clip_batch import encoders

    say = progress or (lambda line: None)
    options = storage.storage_options
    store = Store(output, options)
    target = _target(config)
    images, captions = (
        tuple(name.lower().lstrip(".") for name in names)
        for names in (config.image_extensions, config.caption_extensions)
    )
    shards = specs.expand_inputs(config.input, config.format, options)
    if config.format == "files":
        shards = [count_folder(shard, images, captions, options) for shard in shards]
    say(f"{len(shards):,} inputs found")
    encoder = encoders.resolve(config.model, config.pretrained, config.preprocess, config.precision, options)
    draft = Plan((), encoder, config.format, {}, images, captions)
    if not store.exists(paths.PLAN):
        if config.format == "tar":
            shards = count_samples(shards, "samples" in target, options)
        partitions = pack(shards, target, split_folder if config.format == "files" else _tar_splitter(target, options))
        fields = sample_fields(shards, draft, options)
        plan = replace(draft, partitions=partitions, fields=fields)
        plan = replace(plan, digest=_digest(plan))
        if _write(store, plan, shards, target, config):
            say(f"{len(partitions):,} partitions planned")
            return plan
    standing, found = _load(store)
    if differences := _differences(standing, found, draft, shards, target):
        raise PlanError(f"another plan stands at {store.url}: {'; '.join(differences)}; give another --output")
    say("unchanged")
    return standing


def count_partitions(store: Store) -> int:
    """How many partitions are planned, without reading them; PlanError if there is no plan."""
    return int(_head(store)["partitions"])


def load_plan(store: Store) -> Plan:
    """The plan of an output; PlanError if it has none, CorruptError if its files do not fit together."""
    return _load(store)[0]


def _tar_splitter(target: dict[str, int], options: dict[str, Any]) -> Split:
    from clip_batch.samples.tar.scan import scan_tar

    def split(tar: Shard, places: Sequence[float]) -> list[Cut]:
        cuts = [cut for cut in scan_tar(tar, options)[0] if 0 < cut[0] < (tar.size or 0)]
        axis = [samples if "samples" in target else byte for byte, samples in cuts]
        return [cuts[nearest(axis, place)] for place in places] if cuts else []

    return split


def _target(config: PlanConfig) -> dict[str, int]:
    """What partitions are packed by: {"partitions": n}, {"samples": n} or {"bytes": n}."""
    if config.partition_count is not None and config.partition_samples is not None:
        raise ConfigError("--partition-count and --partition-samples exclude each other: give one")
    if config.partition_count is not None:
        target = {"partitions": config.partition_count}
    elif config.partition_samples is not None or config.format == "files":
        target = {"samples": FILES_SAMPLES if config.partition_samples is None else config.partition_samples}
    else:
        target = {"bytes": parse_bytes(config.partition_bytes)}
    for unit, value in target.items():
        if value < 1:
            raise ConfigError(f"a partition target of {value} {unit} cannot be met: give 1 or more")
    return target


def _digest(plan: Plan) -> str:
    """sha256 over all that changes the result: slices in order, encoder, schema, extensions."""
    head = [FORMAT, plan.encoder.fingerprint, plan.format, plan.fields, plan.image_extensions, plan.caption_extensions]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for partition in plan.partitions:
        rows = [(s.shard.url, s.shard.size, s.shard.etag, s.start, s.stop) for s in partition.slices]
        digest.update(f"{partition.id} {rows!r}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _write(store: Store, plan: Plan, shards: Sequence[Shard], target: dict[str, int], config: PlanConfig) -> bool:
    """Publish the plan's files, plan.json last; False if another planner was first."""
    from datetime import UTC, datetime

    import yaml

    table = _parquet(plan.partitions)
    sizes, counts = [shard.size for shard in shards], [shard.samples for shard in shards]
    head = {
        "format": FORMAT,
        "digest": plan.digest,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "partitions": len(plan.partitions),
        "shards": len(shards),
        "samples": None if None in counts else sum(filter(None, counts)),
        "bytes": None if None in sizes else sum(filter(None, sizes)),
        "encoder": {**asdict(plan.encoder), "fingerprint": plan.encoder.fingerprint},
        "format_": plan.format,
        "fields": plan.fields,
        "image_extensions": plan.image_extensions,
        "caption_extensions": plan.caption_extensions,
        "target": target,
        "plan_parquet": {"bytes": len(table), "sha256": hashlib.sha256(table).hexdigest()},
    }
    settings = yaml.safe_dump({"plan": asdict(config)}, sort_keys=False, allow_unicode=True).encode()
    for name, data in ((paths.SLICES, table), (paths.CONFIG, settings)):
        if not store.create(name, data) and not store.exists(paths.PLAN) and store.read(name) != data:
            raise PlanError(
                f"{store.display(name)} was left by a planner that died, or another one is at work: "
                "if none is, delete that file and plan again"
            )
    return store.create(paths.PLAN, json.dumps(head, indent=1).encode())


def _parquet(partitions: Sequence[Partition]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    slices = [piece for partition in partitions for piece in partition.slices]
    columns = {
        "partition": pa.array([part.id for part in partitions for _ in part.slices], pa.int32()),
        "url": pa.array([piece.shard.url for piece in slices], pa.string()),
        "size": pa.array([piece.shard.size for piece in slices], pa.int64()),
        "etag": pa.array([piece.shard.etag for piece in slices], pa.string()),
        "shard_samples": pa.array([piece.shard.samples for piece in slices], pa.int64()),
        "start": pa.array([piece.start for piece in slices], pa.int64()),
        "stop": pa.array([piece.stop for piece in slices], pa.int64()),
        "samples": pa.array([piece.samples for piece in slices], pa.int64()),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd", use_dictionary=["partition", "start"])
    return buffer.getvalue()


def _head(store: Store) -> dict[str, Any]:
    """plan.json, its format checked."""
    try:
        head: dict[str, Any] = store.read_json(paths.PLAN)
    except FileNotFoundError:
        raise PlanError(f"no plan at {store.url}: clip-batch plan --input ... --output {store.url}") from None
    except ValueError:
        where = store.display(paths.PLAN)
        raise CorruptError(f"{where} is not JSON: restore it, or plan into another --output") from None
    if (format := head.get("format")) != FORMAT:
        where = store.display(paths.PLAN)
        raise PlanError(f"{where} has format {format}, not {FORMAT}: use the version it was planned with")
    return head


def _load(store: Store) -> tuple[Plan, dict[str, Any]]:
    head = _head(store)
    try:
        table = store.read(paths.SLICES)
    except FileNotFoundError:
        table = b""
    if hashlib.sha256(table).hexdigest() != head["plan_parquet"]["sha256"]:
        raise CorruptError(
            f"{store.display(paths.SLICES)} is not what was planned: restore it, or plan into another --output"
        )
    encoder = EncoderSpec(**{name: value for name, value in head["encoder"].items() if name != "fingerprint"})
    images, captions = tuple(head["image_extensions"]), tuple(head["caption_extensions"])
    return Plan(
        _read_partitions(table), encoder, head["format_"], head["fields"], images, captions, head["digest"]
    ), head


def _read_partitions(table: bytes) -> tuple[Partition, ...]:
    from clip_batch.storage.arrow import ParquetFile

    columns = [column.to_pylist() for column in ParquetFile(io.BytesIO(table)).read().columns]
    slices: list[list[Slice]] = []
    shard = Shard("")
    for partition, url, size, etag, total, start, stop, samples in zip(*columns, strict=True):
        if url != shard.url:
            shard = Shard(url, size, etag, total)
        if partition == len(slices):
            slices.append([])
        slices[-1].append(Slice(shard, start, stop, samples))
    return tuple(Partition(id, tuple(pieces)) for id, pieces in enumerate(slices))


def _differences(
    plan: Plan, head: dict[str, Any], draft: Plan, shards: Sequence[Shard], target: dict[str, int]
) -> list[str]:
    """What a new plan would change in the standing one, each as one phrase; [] if nothing."""
    old = {piece.shard.url: piece.shard for partition in plan.partitions for piece in partition.slices}
    new = {shard.url: shard for shard in shards}
    changed = [
        f"{url} ({old[url].size} -> {shard.size} bytes)" if old[url].size != shard.size else f"{url} (rewritten)"
        for url, shard in new.items()
        if url in old and (old[url].size, old[url].etag) != (shard.size, shard.etag)
    ]
    kinds = (("added", [url for url in new if url not in old]), ("removed", [url for url in old if url not in new]))
    found = [
        f"{len(urls)} inputs {kind}: {specs.some(urls, 3)}" for kind, urls in (*kinds, ("changed", changed)) if urls
    ]
    if not found and list(old) != list(new):
        found.append("inputs in another order")
    if plan.encoder.fingerprint != draft.encoder.fingerprint:
        was, now = asdict(plan.encoder), asdict(draft.encoder)
        found += [
            f"{name} {str(was[name])[:40]!r} -> {str(now[name])[:40]!r}" for name in was if was[name] != now[name]
        ]
    settings = ((plan, draft, name) for name in ("format", "image_extensions", "caption_extensions"))
    pairs = [(name, getattr(a, name), getattr(b, name)) for a, b, name in settings]
    return found + [
        f"{name} {was} -> {now}"
        for name, was, now in (*pairs, ("partition target", head["target"], target))
        if was != now
    ]
