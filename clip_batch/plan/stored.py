"""The files of a plan in OUT/_clip_batch: written once, created only if absent, and read back as one Plan.

`plan.parquet` has one row per slice, and `plan.json` everything else. plan.json is written last and has the sha256 of
plan.parquet, so that a plan is complete or does not exist. Neither file ever changes, unless another plan takes the
place of one of which nothing is committed (see `replace`).

An extension of a plan is a further generation of partitions, in a pair of files of the same kind: a Parquet file that
is named by its sha256, and then `extensions/<number>-<digest>.json`, named by the digest of what it extends. Creating
the latter is the comparison: of two planners that extend the same plan, one does.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from shlex import quote
from typing import Any

from clip_batch.errors import CorruptError, PlanError
from clip_batch.plan import paths
from clip_batch.plan.pack import PartitionTarget
from clip_batch.plan.state import newer_inputs
from clip_batch.samples import listings
from clip_batch.storage.names import name_text, text_name
from clip_batch.storage.store import Store
from clip_batch.types import MODALITIES, EncoderSpec, Generation, Partition, Plan, Shard, Slice

FORMAT = 1
"""The version of the plan's files; a plan of another one is refused."""


def read_generations(store: Store) -> tuple[Generation, ...]:
    """The generations of the plan of an output, from its JSON files alone; PlanError if there is no plan."""
    head = _head(store)
    first = Generation(0, int(head["partitions"]), head["digest"])
    return (first, *(_generation(one) for one in _extensions(store, first.digest)))


def count_partitions(store: Store) -> int:
    """The number of partitions of the plan of an output, from its JSON files alone; PlanError if there is no plan."""
    return read_generations(store)[-1].stop


def load_plan(store: Store) -> Plan:
    """The plan of an output. PlanError: there is none. CorruptError: a Parquet file is not the one that was planned."""
    return load(store)[0]


def load(store: Store) -> tuple[Plan, dict[str, Any]]:
    """The plan, and plan.json; errors as of `load_plan`."""
    head = _head(store)
    encoder = EncoderSpec(**{name: value for name, value in head["encoder"].items() if name != "fingerprint"})
    images, captions = tuple(head["image_extensions"]), tuple(head["caption_extensions"])
    partitions = tuple(_read_partitions(store, paths.SLICES, head["plan_parquet"]["sha256"]))
    plan = Plan(partitions, encoder, head["format_"], head["fields"], images, captions, head["digest"])
    plan = replace(plan, passed_over=head.get("passed_over", {}), caption_field=head.get("caption_field", ""))
    plan = replace(plan, key_ends=head.get("key_ends", "first-dot"), image_field=head.get("image_field", ""))
    plan = replace(plan, modalities=tuple(head.get("modalities", MODALITIES)), listings=store.display(paths.LISTINGS))
    for record in _extensions(store, plan.digest):
        file = record["plan_parquet"]
        added = _read_partitions(store, f"{paths.EXTENSIONS}/{file['name']}", file["sha256"], record["first"])
        plan = extended(plan, tuple(added), record["digest"], record["passed_over"])
    return plan, head


def extended(plan: Plan, added: tuple[Partition, ...], digest: str, passed_over: dict[str, int]) -> Plan:
    """The plan with the partitions of one more generation; `passed_over` was counted anew, in all of the input."""
    start = len(plan.partitions)
    before = plan.generations or (Generation(0, start, plan.digest),)
    generations = (*before, Generation(start, start + len(added), digest))
    partitions = (*plan.partitions, *added)
    return replace(plan, partitions=partitions, digest=digest, passed_over=passed_over, generations=generations)


def plan_digest(plan: Plan) -> str:
    """sha256 over everything that changes the result: slices in order, encoder, schema, extensions, caption field."""
    head = [FORMAT, plan.encoder.fingerprint, plan.format, plan.fields, plan.image_extensions, plan.caption_extensions]
    head += [{"caption_field": plan.caption_field}] if plan.caption_field else []  # older plans keep their digests
    head += [{"key_ends": plan.key_ends}] if plan.key_ends != "first-dot" else []
    head += [{"image_field": plan.image_field}] if plan.image_field else []
    head += [{"modalities": plan.modalities}] if plan.modalities != MODALITIES else []
    return _digest(json.dumps(head, sort_keys=True), plan.partitions)


def extension_digest(plan: Plan, added: Sequence[Partition]) -> str:
    """sha256 over the plan that is extended, by its digest, and the slices of the new partitions in order."""
    return _digest(json.dumps({"extends": plan.digest}), added)


def _digest(head: str, partitions: Sequence[Partition]) -> str:
    digest = hashlib.sha256(head.encode())
    for partition in partitions:
        rows = [(s.shard.url, s.shard.size, s.shard.etag, s.start, s.stop) for s in partition.slices]
        digest.update(f"{partition.id} {rows!r}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def write_plan(
    store: Store, plan: Plan, shards: Sequence[Shard], target: PartitionTarget, settings: dict[str, Any]
) -> bool:
    """Write the plan's files, plan.json last; False if another process wrote a plan first."""
    import yaml

    table = _parquet(plan.partitions)
    head = {
        "format": FORMAT,
        **_summary(plan.digest, plan.partitions, shards, target),
        "encoder": plan.encoder.record(),
        "format_": plan.format,
        "fields": plan.fields,
        "image_extensions": plan.image_extensions,
        "caption_extensions": plan.caption_extensions,
        "caption_field": plan.caption_field,
        "key_ends": plan.key_ends,
        "image_field": plan.image_field,
        "modalities": plan.modalities,
        "passed_over": plan.passed_over,
        "plan_parquet": {"bytes": len(table), "sha256": hashlib.sha256(table).hexdigest()},
    }
    config = yaml.safe_dump({"plan": settings}, sort_keys=False, allow_unicode=True).encode()
    for name, data in ((paths.SLICES, table), (paths.CONFIG, config)):
        if not store.create(name, data) and not store.exists(paths.PLAN) and store.read(name) != data:
            raise PlanError(
                f"{store.display(name)} was left by a planner that died, or another one is at work: "
                "if none is, delete that file and plan again"
            )
    return store.create(paths.PLAN, json.dumps(head, indent=1).encode())


def write_extension(
    store: Store,
    plan: Plan,
    added: tuple[Partition, ...],
    shards: Sequence[Shard],
    target: PartitionTarget,
    passed_over: dict[str, int],
) -> Plan | None:
    """Append `added`, which has all of `shards`, to a plan; None if another process has extended that plan first."""
    table = _parquet(added)
    sha256 = hashlib.sha256(table).hexdigest()
    number, digest = max(len(plan.generations), 1), extension_digest(plan, added)
    file = {"name": paths.extension_slices(sha256), "bytes": len(table), "sha256": sha256}
    record = {
        "format": FORMAT,
        "extends": plan.digest,
        "first": len(plan.partitions),
        **_summary(digest, added, shards, target),
        "passed_over": passed_over,
        "plan_parquet": file,
    }
    name = paths.extension(number, plan.digest)
    store.create(f"{paths.EXTENSIONS}/{file['name']}", table)
    if not store.create(name, json.dumps(record, indent=1).encode()):
        return None
    return extended(plan, added, digest, passed_over)


def unused_files(store: Store) -> list[str]:
    """The files of planners that died or came second, which no generation and no commit needs."""
    used = set[str]()
    number, digest = 1, str(_head(store)["digest"])
    for record in _extensions(store, digest):
        used |= {paths.extension(number, digest), f"{paths.EXTENSIONS}/{record['plan_parquet']['name']}"}
        number, digest = number + 1, record["digest"]
    newer = (version for inputs in newer_inputs(store).values() for _, version in inputs.values())
    shards = (piece.shard.etag for partition in load_plan(store).partitions for piece in partition.slices)
    used |= {f"{paths.LISTINGS}/{listings.file_name(etag)}" for etag in {*shards, *newer} if etag}
    folders = (paths.EXTENSIONS, paths.LISTINGS)
    return [name for folder in folders for base in store.list(folder) if (name := f"{folder}/{base}") not in used]


def _summary(
    digest: str, partitions: Sequence[Partition], shards: Sequence[Shard], target: PartitionTarget
) -> dict[str, Any]:
    """What the JSON of each generation says of its partitions."""
    from datetime import UTC, datetime

    sizes, counts = [shard.size for shard in shards], [shard.samples for shard in shards]
    return {
        "digest": digest,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "partitions": len(partitions),
        "shards": len(shards),
        "samples": None if None in counts else sum(filter(None, counts)),
        "bytes": None if None in sizes else sum(filter(None, sizes)),
        "target": {target.unit: len(partitions) if target.unit == "auto" else target.value},
    }


def _parquet(partitions: Sequence[Partition]) -> bytes:
    """The Parquet file of partitions, which `_read_partitions` reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    slices = [piece for partition in partitions for piece in partition.slices]
    columns = {
        "partition": pa.array([part.id for part in partitions for _ in part.slices], pa.int32()),
        "url": pa.array([name_text(piece.shard.url) for piece in slices], pa.string()),
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
    """plan.json. PlanError: it does not exist or has another format. CorruptError: it is not JSON."""
    try:
        head: dict[str, Any] = store.read_json(paths.PLAN)
    except FileNotFoundError:
        if store.exists(f"{paths.IN_RUN}/{paths.PLAN}"):
            inner = store.display(paths.IN_RUN)
            raise PlanError(f"no plan at {store.url}, but in its embeddings: give --output {quote(inner)}") from None
        if store.exists(paths.OF_INDEX):
            raise PlanError(
                f"{store.url} is an index, no embeddings folder: name an OUT, or give it as --index"
            ) from None
        raise PlanError(f"no plan at {store.url}: clip-batch plan --input ... --output {quote(store.url)}") from None
    except ValueError:
        where = store.display(paths.PLAN)
        raise CorruptError(f"{where} is not JSON: restore it, or plan into another output") from None
    return _checked(store, paths.PLAN, head)


def _checked(store: Store, name: str, record: dict[str, Any]) -> dict[str, Any]:
    if (format := record.get("format")) != FORMAT:
        raise PlanError(f"{store.display(name)} has format {format}, not {FORMAT}: use the version it was planned with")
    return record


def _extensions(store: Store, digest: str) -> Iterator[Mapping[str, Any]]:
    """The records of the extensions of the plan with this digest, in order; what extends another plan is left out."""
    names = set(store.list(paths.EXTENSIONS))
    number = 1
    while (name := paths.extension(number, digest)).rpartition("/")[2] in names:
        try:
            record: dict[str, Any] = store.read_json(name)
        except ValueError:
            raise CorruptError(f"{store.display(name)} is not JSON: restore it") from None
        yield _checked(store, name, record)
        number, digest = number + 1, record["digest"]


def _generation(record: Mapping[str, Any]) -> Generation:
    first = int(record["first"])
    return Generation(first, first + int(record["partitions"]), record["digest"])


def _read_partitions(store: Store, name: str, sha256: str, first: int = 0) -> Iterator[Partition]:
    """The partitions in a Parquet file, numbered from `first` on; neighbouring slices of one shard share its object."""
    from clip_batch.storage.arrow import ParquetFile

    try:
        table = store.read(name)
    except FileNotFoundError:
        table = b""
    if hashlib.sha256(table).hexdigest() != sha256:
        raise CorruptError(
            f"{store.display(name)} is not the file that was planned: restore it, or plan into another output"
        )
    columns = [column.to_pylist() for column in ParquetFile(io.BytesIO(table)).read().columns]
    slices: list[list[Slice]] = []
    last, shard = ("", None), Shard("")
    for partition, url, size, etag, total, start, stop, samples in zip(*columns, strict=True):
        if (url, etag) != last:
            last, shard = (url, etag), Shard(text_name(url), size, etag, total)
        if partition == first + len(slices):
            slices.append([])
        slices[-1].append(Slice(shard, start, stop, samples))
    return (Partition(first + id, tuple(pieces)) for id, pieces in enumerate(slices))
