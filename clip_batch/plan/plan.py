"""Makes the plan: which shards, in which partitions, by which encoder; and extends it where the input has grown.

What is on disk is written and read by `stored`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from shlex import quote
from typing import Any

from clip_batch.config import PlanConfig, StorageConfig, parse_bytes
from clip_batch.config.paths import path_text
from clip_batch.encoders.device import loaded_gpus
from clip_batch.errors import ConfigError, InputError, PlanError, some
from clip_batch.plan import paths, specs
from clip_batch.plan.apart import check_apart, contains
from clip_batch.plan.automatic import affordable, automatic_target
from clip_batch.plan.counts import count_folder, count_samples, image_advice
from clip_batch.plan.cuts import FindCuts, find_cuts, folder_cuts, parquet_cuts, tar_cuts
from clip_batch.plan.excluded import leave_out
from clip_batch.plan.folders import freeze_folders, write_listings
from clip_batch.plan.growth import Growth, compare, moved_lines, retry_command
from clip_batch.plan.kinds import check_kinds
from clip_batch.plan.pack import PartitionTarget, pack, places_to_cut
from clip_batch.plan.parquet import look_at_columns
from clip_batch.plan.replace import obstacle, replaced
from clip_batch.plan.schema import caption_advice, infer_fields, look_at_samples, name_advice
from clip_batch.plan.stored import count_partitions as count_partitions
from clip_batch.plan.stored import load, plan_digest, write_extension, write_plan
from clip_batch.plan.stored import load_plan as load_plan
from clip_batch.samples.files import Folder, list_samples
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
    StrPath,
    counted,
    format_counts,
)

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
    excluding: StrPath | Iterable[StrPath] = (),
    storage: StorageConfig = StorageConfig(),
    progress: Progress | None = None,
) -> Plan:
    """Freeze a plan of `input` at `output`, or return the plan that exists there if nothing differs.

    `input` is one path, URL, glob or brace pattern, or several of them, and takes the place of `config.input`. Another
    plan at `output` is replaced as long as no partition of it is committed and no worker is at work on it. Where the
    input has only grown, `config.extend` adds partitions of what is new to the plan, and leaves all others as they are.
    What the OUTs `excluding` have planned is left out.

    Example: `make_plan("tars/{000..127}.tar", "out", PlanConfig(model="ViT-B-32", pretrained="openai"))`.

    ConfigError: an option is wrong. InputError: an input is missing or named twice. EncoderError: the weights cannot be
    found, or the model cannot embed. PlanError: another plan exists at `output` and stays; it lists the differences,
    or what is new where `extend` would add it.
    """
    from clip_batch import encoders

    say = progress or (lambda line: None)
    PlanConfig.expect(config=config), StorageConfig.expect(storage=storage)
    options = storage.storage_options
    config = replace(config, input=[path_text(spec, "an input") for spec in _as_list(input)])
    store = Store(path_text(output, "output"), options)
    images, captions = _extensions(config)
    _target(config)  # refuses wrong options before it looks at input
    store.check_folder()
    inputs = specs.expand_inputs(config.input, config.format, options, say)
    if inputs.format == "parquet":  # the metadata of OUT are Parquet files
        check_apart(store.url, [folder for folder in inputs.folders if contains(folder, store.url)])
    config = replace(config, format=inputs.format)
    target = _target(config)
    folders: dict[str, Folder] = {}
    if config.format == "files":
        check_apart(store.url, [shard.url for shard in inputs.shards])
        folders = _list_folders(inputs, images, captions, options, say)
    else:
        check_kinds(inputs.shards, options, config.format)
    _check_unreadable(inputs, config)
    if planners := [Store(path_text(url, "excluding"), options) for url in _as_list(excluding)]:
        own = (store, load_plan(store)) if store.exists(paths.PLAN) else None
        leave_out(inputs.shards, folders, planners, own, say)
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
    draft = replace(draft, listings=store.display(paths.LISTINGS))
    if config.format == "parquet":
        files = [shard for shard in shards if shard.etag != UNREADABLE]
        modalities, lines = look_at_columns(files, draft, options)
        draft = replace(draft, modalities=modalities)
        for line in lines:
            say(line)

    def differences(existing: Plan, head: dict[str, Any]) -> list[str]:
        """How the options differ from those of the plan that exists, one phrase each."""
        mode = existing.encoder.preprocess if existing.encoder.preprocess in modes else modes[0]
        encoder = replace(draft.encoder, preprocess=mode)
        if config.exif_rotation == "auto":  # a plan from before there was this option ignores it
            encoder = replace(encoder, exif_rotation=existing.encoder.exif_rotation)
        return _differences(existing, head, replace(draft, encoder=encoder), target)

    phrases: list[str] = []
    while old := load(store) if store.exists(paths.PLAN) else None:
        growth, others = compare(store, old[0], shards, folders), differences(*old)
        if not (phrases := growth.phrases + others):
            say("unchanged")
            return old[0]
        why, refused = obstacle(store), bool(growth.differences or others)
        extends = bool(growth.new) and not refused and config.extend
        if not (why or (extends and not growth.moved)):
            break  # another plan takes its place
        if refused or (growth.new and not extends):
            raise _refusal(store, growth, refused, phrases, why)
        for line in moved_lines(growth, store.url):
            say(line)
        if not growth.new:
            say("unchanged")
            return old[0]
        if plan := _extend(store, old[0], growth, passed_over, target, options, say):
            return plan  # otherwise another planner was faster: compare again
    frozen: dict[str, bytes] = {}
    if config.format == "files":
        shards, frozen = freeze_folders(shards, folders)
    shards = _counted(shards, target, draft, options)
    look = look_at_samples(shards, draft, options, folders)
    partitions = _partitions(shards, target, look.sample_bytes, draft, options)
    for line in name_advice(look):
        say(line)
    if advice := caption_advice(look, config.caption_field):
        say(advice)
    encoder = _tried(encoder, look.firsts, config, modes, options, say)
    plan = replace(draft, partitions=partitions, fields=_fields(draft, look.records), encoder=encoder)
    plan = replace(plan, digest=plan_digest(plan))
    settings = {**asdict(config), "preprocess": encoder.preprocess}
    with replaced(store, old[0].digest) if old else nullcontext():
        write_listings(store, frozen)
        written = write_plan(store, plan, shards, target, settings)
    if written:
        say(f"{counted(len(partitions), 'partition')} planned")
        if (visible := loaded_gpus()) > len(partitions):
            say(f"fewer partitions than the {visible} GPUs of this machine: --partition-count {visible} gives each one")
        if old:
            say(f"they replace the plan that was there, of which nothing was committed: {'; '.join(phrases)}")
        return plan
    existing, head = load(store)  # another planner was faster
    if phrases := compare(store, existing, inputs.shards, folders).phrases + differences(existing, head):
        raise PlanError(f"another plan was made at {store.url} meanwhile: {'; '.join(phrases)}; plan again")
    say("unchanged")
    return existing


def _refusal(store: Store, growth: Growth, refused: bool, phrases: Sequence[str], why: str) -> PlanError:
    """The error of a plan that exists and stays; without `refused` its input has only grown."""
    if refused:
        remedy = f"; {retry_command(store.url)} changed embeds changed inputs again here" if growth.rewritten else ""
        return PlanError(f"another plan exists at {store.url} ({'; '.join(phrases)}), and {why}{remedy}")
    remedy = f"plan with --extend adds what is new to it; --except {quote(store.url)} plans that into another --output"
    return PlanError(f"the input of the plan at {store.url} has grown ({growth.added}): {remedy}")


def _extend(
    store: Store,
    plan: Plan,
    growth: Growth,
    passed_over: dict[str, int],
    target: PartitionTarget,
    options: dict[str, Any],
    say: Progress,
) -> Plan | None:
    """Add the new inputs to a plan as one more generation; None if another planner has extended it first."""
    write_listings(store, growth.listings)
    shards = _counted(growth.new, target, plan, options)
    look = look_at_samples(shards, plan, options)
    start = len(plan.partitions)
    packed = _partitions(shards, target, look.sample_bytes, plan, options)
    added = tuple(replace(partition, id=start + partition.id) for partition in packed)
    extended = write_extension(store, plan, added, shards, target, passed_over)
    if extended:
        number = len(extended.generations) - 1
        say(f"the input has grown, {growth.added}: {counted(len(added), 'partition')} added as generation {number}")
    return extended


def _counted(shards: list[Shard], target: PartitionTarget, draft: Plan, options: dict[str, Any]) -> list[Shard]:
    """The shards with their numbers of samples, where these are needed or cheap."""
    return shards if draft.format == "files" else count_samples(shards, target.unit == "samples", draft, options)


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


def _list_folders(
    inputs: specs.Inputs, images: Sequence[str], captions: Sequence[str], options: specs.Options, say: Progress
) -> dict[str, Folder]:
    """What is in folders of files, by URL; their samples are counted, and what is none."""
    folders: dict[str, Folder] = {}
    for number, folder in enumerate(inputs.shards):
        listed = list_samples(folder.url, images, captions, options, say, versions=True)
        inputs.shards[number] = count_folder(folder, listed, images)
        folders[folder.url] = listed
        inputs.passed_over.update(listed.passed_over)
        inputs.unreadable.update(listed.unreadable)
    inputs.shards = [folder for folder in inputs.shards if folder.url not in inputs.unreadable]
    return folders


def _check_unreadable(inputs: specs.Inputs, config: PlanConfig) -> None:
    """Add the folders that cannot be listed as shards, for a worker to record. InputError: they are to be refused."""
    if inputs.unreadable and config.unreadable == "fail":
        names = [f"{name} ({why})" for name, why in sorted(inputs.unreadable.items())]
        raise InputError(f"cannot be listed: {some(names)}; mend the permissions, or plan with --unreadable record")
    size = None if config.format == "files" else 0
    inputs.shards += [Shard(url, size, UNREADABLE, 0) for url in sorted(inputs.unreadable)]


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


def _differences(plan: Plan, head: dict[str, Any], draft: Plan, target: PartitionTarget) -> list[str]:
    """How the options of a new plan would differ from those of the one that exists, one phrase each."""
    phrases = list[str]()
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
