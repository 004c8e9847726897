"""Makes the plan, writes it to OUT/_clip_batch and loads it: which shards, in which partitions, by which encoder.

`plan.parquet` has one row per slice, and `plan.json` everything else. plan.json is written last and has the sha256 of
plan.parquet, so that a plan is complete or does not exist. Neither file ever changes, unless another plan takes the
place of one of which nothing is committed (see `replace`).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from shlex import quote
from typing import Any

from clip_batch.config import PlanConfig, StorageConfig, parse_bytes
from clip_batch.config.paths import path_text
from clip_batch.encoders.device import loaded_gpus
from clip_batch.errors import ConfigError, CorruptError, InputError, PlanError, some
from clip_batch.plan import paths, specs
from clip_batch.plan.apart import check_apart
from clip_batch.plan.automatic import affordable, automatic_target
from clip_batch.plan.counts import count_folder, count_samples, image_advice
from clip_batch.plan.cuts import FindCuts, find_cuts, folder_cuts, parquet_cuts, tar_cuts
from clip_batch.plan.kinds import check_kinds
from clip_batch.plan.pack import PartitionTarget, pack, places_to_cut
from clip_batch.plan.parquet import column_lines
from clip_batch.plan.replace import obstacle, replaced
from clip_batch.plan.schema import caption_advice, infer_fields, look_at_samples, name_advice
from clip_batch.samples.files import list_samples
from clip_batch.storage.names import name_text, text_name
from clip_batch.storage.store import Store
from clip_batch.types import (
    IMAGE_COLUMN,
    MODALITIES,
    ROW_GROUP,
    UNREADABLE,
    EncoderSpec,
    Partition,
    Plan,
    Sample,
    Shard,
    Slice,
    StrPath,
    counted,
    format_counts,
)

FORMAT = 1
"""The version of the plan's files; a plan of another one is refused."""

FORMER_DEFAULTS = (PartitionTarget("bytes", 4 * 10**9), PartitionTarget("samples", 10_000))
"""Targets that plans have from before there was "auto"; an option that says nothing keeps them."""

AUTO = ("fast", "exact")
"""What `preprocess` auto stands for: the first of these that supports the model's transform."""

Progress = Callable[[str], None]
"""Takes one line of text about each step."""


def make_plan(
    input: StrPath | Iterable[StrPath],
    output: StrPath,
    config: PlanConfig = PlanConfig(),
    *,
    storage: StorageConfig = StorageConfig(),
    progress: Progress | None = None,
) -> Plan:
    """Freeze a plan of `input` at `output`, or return the plan that exists there if nothing differs.

    `input` is one path, URL, glob or brace pattern, or several of them, and takes the place of `config.input`. Another
    plan at `output` is replaced as long as no partition of it is committed and no worker is at work on it.

    Example: `make_plan("tars/{000..127}.tar", "out", PlanConfig(model="ViT-B-32", pretrained="openai"))`.

    ConfigError: an option is wrong. InputError: an input is missing or named twice. EncoderError: the weights cannot be
    found, or the model cannot embed. PlanError: another plan exists at `output` and stays; it lists the differences.
    """
    from clip_batch import encoders

    say = progress or (lambda line: None)
    PlanConfig.expect(config=config), StorageConfig.expect(storage=storage)
    options = storage.storage_options
    config = replace(config, input=[path_text(spec, "an input") for spec in _as_list(input)])
    store = Store(path_text(output, "output"), options)
    images, captions = _extensions(config)
    _target(config)  # refuses wrong options before it looks at input
    inputs = specs.expand_inputs(config.input, config.format, options)
    config = replace(config, format=inputs.format)
    target = _target(config)
    if config.format == "files":
        check_apart(store.url, [shard.url for shard in inputs.shards])
        _count_folders(inputs, images, captions, options)
    else:
        check_kinds(inputs.shards, options, config.format)
    _check_unreadable(inputs, config)
    shards, passed_over = inputs.shards, dict(inputs.passed_over)
    say(f"{counted(len(shards), 'input')} found")
    if passed_over:
        say("; ".join(filter(None, [f"passed over: {format_counts(passed_over)}", image_advice(passed_over, images)])))
    modes = AUTO if config.preprocess == "auto" else (config.preprocess,)
    names = config.model, config.pretrained, modes[0], config.precision
    encoder = encoders.resolve(*names, options, exif_rotation=_upright(config))
    if encoder.pretrained and not config.pretrained:
        say(f"the model is {encoder.model} with its default tag {encoder.pretrained}")
    draft = Plan((), encoder, config.format, {}, images, captions, "", passed_over, config.caption_field)
    draft = replace(draft, key_ends=config.key_ends, image_field=config.image_field, modalities=_modalities(config))
    if config.format == "parquet":
        for line in column_lines([shard for shard in shards if shard.etag != UNREADABLE], draft, options):
            say(line)

    def differences(existing: Plan, head: dict[str, Any]) -> list[str]:
        """How the plan to be made differs from the one that exists, one phrase each."""
        mode = existing.encoder.preprocess if existing.encoder.preprocess in modes else modes[0]
        encoder = replace(draft.encoder, preprocess=mode)
        if config.exif_rotation == "auto":  # a plan from before there was this option ignores it
            encoder = replace(encoder, exif_rotation=existing.encoder.exif_rotation)
        return _differences(existing, head, replace(draft, encoder=encoder), shards, target)

    old = _load(store) if store.exists(paths.PLAN) else None
    if old and not (phrases := differences(*old)):
        say("unchanged")
        return old[0]
    if old and (why := obstacle(store)):
        raise PlanError(f"another plan exists at {store.url} ({'; '.join(phrases)}), and {why}")
    if config.format != "files":
        shards = count_samples(shards, target.unit == "samples", draft, options)
    look = look_at_samples(shards, draft, options)
    partitions = _partitions(shards, target, look.sample_bytes, draft, options)
    for line in name_advice(look):
        say(line)
    if advice := caption_advice(look, config.caption_field):
        say(advice)
    encoder = _tried(encoder, look.firsts, config, modes, options, say)
    plan = replace(draft, partitions=partitions, fields=_fields(draft, look.records), encoder=encoder)
    plan = replace(plan, digest=_digest(plan))
    settings = {**asdict(config), "preprocess": encoder.preprocess}
    with replaced(store, old[0].digest) if old else nullcontext():
        written = _write(store, plan, shards, target, settings)
    if written:
        say(f"{counted(len(partitions), 'partition')} planned")
        if (visible := loaded_gpus()) > len(partitions):
            say(f"fewer partitions than the {visible} GPUs of this machine: --partition-count {visible} gives each one")
        if old:
            say(f"they replace the plan that was there, of which nothing was committed: {'; '.join(phrases)}")
        return plan
    existing, head = _load(store)  # another planner was faster
    if phrases := differences(existing, head):
        raise PlanError(f"another plan was made at {store.url} meanwhile: {'; '.join(phrases)}; plan again")
    say("unchanged")
    return existing


def _tried(
    encoder: EncoderSpec,
    samples: Sequence[Sample],
    config: PlanConfig,
    modes: Sequence[str],
    options: dict[str, Any],
    say: Progress,
) -> EncoderSpec:
    """The encoder with the first of `modes` that it supports, once it has embedded a sample; with the first, untried.

    It is not tried where the config says so, and where this machine lacks a library that it needs.
    """
    from clip_batch import encoders

    why = "as --no-try-model says"
    if config.try_model:
        images = [sample.image for sample in samples if sample.image is not None]
        try:
            from clip_batch.samples.texts import decode_texts

            texts = (decode_texts(sample, config.caption_field).caption for sample in samples)
            tried = encoders.try_model(encoder, images, next(filter(None, texts), "a picture"), options, modes)
        except ModuleNotFoundError as error:
            why = f"as {error.name} is not installed here"
        else:
            say(f"the model embeds a sample; preprocessing: {tried.preprocess}")
            return tried
    say(f"the model is not tried, {why}; preprocessing: {encoder.preprocess}")
    return encoder


def _as_list(input: StrPath | Iterable[StrPath]) -> list[StrPath]:
    return list(input) if isinstance(input, Iterable) and not isinstance(input, str | bytes) else [input]


def _count_folders(
    inputs: specs.Inputs, images: Sequence[str], captions: Sequence[str], options: specs.Options
) -> None:
    """Count the samples of folders of files, and what is none."""
    for number, folder in enumerate(inputs.shards):
        listed = list_samples(folder.url, images, captions, options)
        inputs.shards[number] = count_folder(folder, listed, images)
        inputs.passed_over.update(listed.passed_over)
        inputs.unreadable.update(listed.unreadable)
    inputs.shards = [folder for folder in inputs.shards if folder.url not in inputs.unreadable]


def _check_unreadable(inputs: specs.Inputs, config: PlanConfig) -> None:
    """Add the folders that cannot be listed as shards, for a worker to record. InputError: they are to be refused."""
    if inputs.unreadable and config.unreadable == "fail":
        names = [f"{name} ({why})" for name, why in sorted(inputs.unreadable.items())]
        raise InputError(f"cannot be listed: {some(names)}; mend the permissions, or plan with --unreadable record")
    size = None if config.format == "files" else 0
    inputs.shards += [Shard(url, size, UNREADABLE, 0) for url in sorted(inputs.unreadable)]


def count_partitions(store: Store) -> int:
    """The number of partitions of the plan of an output, from plan.json alone; PlanError if there is no plan."""
    return int(_head(store)["partitions"])


def load_plan(store: Store) -> Plan:
    """The plan of an output. PlanError: there is none. CorruptError: plan.parquet is not the one in plan.json."""
    return _load(store)[0]


def _extensions(config: PlanConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The extensions of images and of captions, in lower case, without their dot. ConfigError: a file would be two."""
    images, captions = (
        tuple(name.lower().lstrip(".") for name in names)
        for names in (config.image_extensions, config.caption_extensions)
    )
    if "json" in captions:
        raise ConfigError("--caption-extensions cannot have json: name the field of captions with --caption-field")
    if both := {*images} & {*captions, "json"}:
        raise ConfigError(f"--image-extensions has {min(both)}, which is the extension of other files: leave it out")
    if config.key_ends == "last-dot" and (dotted := [name for name in images + captions if "." in name]):
        raise ConfigError(f"with --key-ends last-dot no extension has a dot, as {dotted[0]} has: leave out one of them")
    return images, captions


def _modalities(config: PlanConfig) -> tuple[str, ...]:
    """What is embedded, in the order of `MODALITIES`. ConfigError: nothing is."""
    modalities = tuple(name for name in MODALITIES if name in config.modalities)
    if not modalities:
        raise ConfigError("--modalities names nothing to embed: give image, text or both")
    return modalities


def _fields(draft: Plan, records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The pinned schema, which in Parquet has the columns that say where a row's image is, whatever was looked at."""
    fields = infer_fields(records)
    if draft.format == "parquet":
        fields |= {ROW_GROUP: "int64", **({IMAGE_COLUMN: "string"} if "image" in draft.modalities else {})}
    return dict(sorted(fields.items()))


def _upright(config: PlanConfig) -> bool:
    """Whether EXIF orientation is applied: unless an option says otherwise, to photographs in folders."""
    return config.format == "files" if config.exif_rotation == "auto" else config.exif_rotation == "apply"


def _target(config: PlanConfig) -> PartitionTarget:
    """What partitions are packed by. ConfigError: two options contradict each other."""
    if config.partition_count is not None and config.partition_samples is not None:
        raise ConfigError("--partition-count and --partition-samples exclude each other: give one")
    if config.partition_count is not None:
        return PartitionTarget("partitions", config.partition_count)
    if config.partition_samples is not None:
        return PartitionTarget("samples", config.partition_samples)
    if config.partition_bytes == "auto":
        return PartitionTarget("auto", 0)
    if config.format == "files":
        raise ConfigError("--partition-bytes is for tars and Parquet files: give --partition-samples for a folder")
    return PartitionTarget("bytes", parse_bytes(config.partition_bytes))


def _partitions(
    shards: Sequence[Shard], target: PartitionTarget, sample_bytes: float, draft: Plan, options: dict[str, Any]
) -> tuple[Partition, ...]:
    """The shards packed into partitions, large ones cut between samples."""
    automatic = target.unit == "auto"
    if automatic:
        target = automatic_target(shards, draft.format, sample_bytes)
    by_samples = target.unit == "samples"
    find: FindCuts = partial(tar_cuts, by_samples=by_samples, draft=draft, options=options)
    if draft.format != "tar":
        parquet = partial(parquet_cuts, by_samples=by_samples, options=options)
        find = parquet if draft.format == "parquet" else folder_cuts
    places = places_to_cut(shards, target)
    return pack(
        shards, target, find_cuts(shards, affordable(places, shards, draft.format) if automatic else places, find)
    )


def _digest(plan: Plan) -> str:
    """sha256 over everything that changes the result: slices in order, encoder, schema, extensions, caption field."""
    head = [FORMAT, plan.encoder.fingerprint, plan.format, plan.fields, plan.image_extensions, plan.caption_extensions]
    head += [{"caption_field": plan.caption_field}] if plan.caption_field else []  # older plans keep their digests
    head += [{"key_ends": plan.key_ends}] if plan.key_ends != "first-dot" else []
    head += [{"image_field": plan.image_field}] if plan.image_field else []
    head += [{"modalities": plan.modalities}] if plan.modalities != MODALITIES else []
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for partition in plan.partitions:
        rows = [(s.shard.url, s.shard.size, s.shard.etag, s.start, s.stop) for s in partition.slices]
        digest.update(f"{partition.id} {rows!r}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _write(
    store: Store, plan: Plan, shards: Sequence[Shard], target: PartitionTarget, settings: dict[str, Any]
) -> bool:
    """Write the plan's files, plan.json last; False if another process wrote a plan first."""
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
        "target": {target.unit: len(plan.partitions) if target.unit == "auto" else target.value},
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


def _parquet(partitions: Sequence[Partition]) -> bytes:
    """plan.parquet, which `_read_partitions` reads."""
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
        raise PlanError(f"no plan at {store.url}: clip-batch plan --input ... --output {quote(store.url)}") from None
    except ValueError:
        where = store.display(paths.PLAN)
        raise CorruptError(f"{where} is not JSON: restore it, or plan into another output") from None
    if (format := head.get("format")) != FORMAT:
        where = store.display(paths.PLAN)
        raise PlanError(f"{where} has format {format}, not {FORMAT}: use the version it was planned with")
    return head


def _load(store: Store) -> tuple[Plan, dict[str, Any]]:
    """The plan, and plan.json; errors as `load_plan`."""
    head = _head(store)
    try:
        table = store.read(paths.SLICES)
    except FileNotFoundError:
        table = b""
    if hashlib.sha256(table).hexdigest() != head["plan_parquet"]["sha256"]:
        raise CorruptError(
            f"{store.display(paths.SLICES)} is not the file that was planned: restore it, or plan into another output"
        )
    encoder = EncoderSpec(**{name: value for name, value in head["encoder"].items() if name != "fingerprint"})
    images, captions = tuple(head["image_extensions"]), tuple(head["caption_extensions"])
    plan = Plan(_read_partitions(table), encoder, head["format_"], head["fields"], images, captions, head["digest"])
    plan = replace(plan, passed_over=head.get("passed_over", {}), caption_field=head.get("caption_field", ""))
    plan = replace(plan, key_ends=head.get("key_ends", "first-dot"), image_field=head.get("image_field", ""))
    plan = replace(plan, modalities=tuple(head.get("modalities", MODALITIES)))
    return plan, head


def _read_partitions(table: bytes) -> tuple[Partition, ...]:
    """The partitions in plan.parquet; neighbouring slices of one shard share its object."""
    from clip_batch.storage.arrow import ParquetFile

    columns = [column.to_pylist() for column in ParquetFile(io.BytesIO(table)).read().columns]
    slices: list[list[Slice]] = []
    last, shard = ("", None), Shard("")
    for partition, url, size, etag, total, start, stop, samples in zip(*columns, strict=True):
        if (url, etag) != last:
            last, shard = (url, etag), Shard(text_name(url), size, etag, total)
        if partition == len(slices):
            slices.append([])
        slices[-1].append(Slice(shard, start, stop, samples))
    return tuple(Partition(id, tuple(pieces)) for id, pieces in enumerate(slices))


def _differences(
    plan: Plan, head: dict[str, Any], draft: Plan, shards: Sequence[Shard], target: PartitionTarget
) -> list[str]:
    """How a new plan would differ from the one that exists, one phrase each; [] if it would not."""
    phrases = _input_differences(plan, shards)
    if plan.encoder.fingerprint != draft.encoder.fingerprint:
        was, now = asdict(plan.encoder), asdict(draft.encoder)
        phrases += [
            f"{name} {str(was[name])[:40]!r} -> {str(now[name])[:40]!r}" for name in was if was[name] != now[name]
        ]
    extensions = ("image_extensions", "caption_extensions")
    names = ("format", *extensions, "caption_field", "key_ends", "image_field", "modalities")
    settings = [(name, getattr(plan, name), getattr(draft, name)) for name in names]
    [(unit, value)] = head["target"].items()
    planned = PartitionTarget(unit, value)
    if target.unit != "auto" or not (planned.unit == "auto" or planned in FORMER_DEFAULTS):
        settings.append(("partition target", planned, target))
    return phrases + [f"{name} {was} -> {now}" for name, was, now in settings if was != now]


def _input_differences(plan: Plan, shards: Sequence[Shard]) -> list[str]:
    """Inputs that were added, removed, changed or reordered since the plan, one phrase each."""
    old = {piece.shard.url: piece.shard for partition in plan.partitions for piece in partition.slices}
    new = {shard.url: shard for shard in shards}
    inputs = {
        "added": [url for url in new if url not in old],
        "removed": [url for url in old if url not in new],
        "changed": [
            f"{url} ({old[url].size} -> {shard.size} bytes)" if old[url].size != shard.size else f"{url} (rewritten)"
            for url, shard in new.items()
            if url in old and (old[url].size, old[url].etag) != (shard.size, shard.etag)
        ],
    }
    phrases = [f"{counted(len(urls), 'input')} {kind}: {some(urls, 3)}" for kind, urls in inputs.items() if urls]
    return phrases or (["inputs in another order"] if list(old) != list(new) else [])
