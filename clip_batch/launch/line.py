"""`clip-batch run`: plan, embed and merge one's own data in DIR, each stage resumed where it stopped.

DIR/embeddings is an ordinary OUT and DIR/index an ordinary INDEX, as when each command is called apart. `end2end` is
the same line behind a download.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from shlex import quote

from clip_batch.config import EmbedConfig, MergeConfig, PlanConfig, StorageConfig
from clip_batch.embeddings.renewal import CHANGED
from clip_batch.embeddings.repair import repair
from clip_batch.embeddings.status import OutputStatus, status
from clip_batch.errors import ConfigError, EncoderError, IncompleteError, InputError, PlanError, Preempted, some
from clip_batch.index import held
from clip_batch.index.manifest import Manifest, load_manifest
from clip_batch.index.merge.job import open_source
from clip_batch.index.merge.merge import merge
from clip_batch.index.publications import live_version
from clip_batch.launch import local
from clip_batch.launch.end2end import paths
from clip_batch.plan import paths as output_paths
from clip_batch.plan.apart import beside, check_apart, contains
from clip_batch.plan.kinds import detect_format
from clip_batch.plan.plan import load_plan, make_plan
from clip_batch.plan.specs import read_lists
from clip_batch.samples.tar.suffixes import is_tar, tar_stem
from clip_batch.storage.paths import absolute, is_local
from clip_batch.storage.store import Store
from clip_batch.types import counted

Say = Callable[[str], None]

CHEAP_ROWS = 100_000
"""Rows of an index up to which it is built anew where its only OUT has grown: that takes seconds, and trains on all."""


def run_line(
    folder: str,
    plan_config: PlanConfig,
    embed_config: EmbedConfig,
    merge_config: MergeConfig,
    storage: StorageConfig,
    workers: int,
    say: Say,
    then: str = "",
) -> tuple[str, OutputStatus]:
    """Build an index of `plan_config.input` in `folder`; return the index's URL and the state of its embeddings.

    `then` names what the caller does afterwards. Raises InputError if no sample can be embedded, IncompleteError if
    partitions fail (running it again resumes), Preempted, and what each stage raises.
    """
    output, index = f"{folder}/{paths.OUTPUT}", f"{folder}/{paths.INDEX}"
    store = Store(output, storage.storage_options)
    stages = ["plan", "embed", "merge", *([then] if then else [])]

    def begin(number: int, what: str) -> None:
        after = f"; then {', '.join(stages[number:])}" if stages[number:] else ""
        say(f"step {number} of {len(stages)}: {what}{after}")

    begin(1, "plan, which freezes what is embedded and by which model")
    plan_line(store, index, plan_config, storage, lambda line: say(f"plan: {line}"))
    record_spec(folder, plan_config.input, storage)
    begin(2, "embed, which turns images and captions into vectors")
    embed_all(output, embed_config, storage, workers, say)
    renew_changed(store, embed_config, storage, lambda line: say(f"embed: {line}"))
    state = status(store)
    if not state.rows:
        raise InputError(f"none of the samples could be embedded: clip-batch status --output {quote(output)} says why")
    begin(3, "merge, which builds the index")
    merge_line(output, index, merge_config, storage, lambda line: say(f"merge: {line}"))
    return index, state


def plan_line(store: Store, index: str, config: PlanConfig, storage: StorageConfig, say: Say) -> None:
    """Plan, or extend the plan of an earlier run by what is new. PlanError: input that was planned is gone or changed.

    With `--model auto` the model of the plan that exists is kept. Where there is none, and the default model is neither
    on this machine nor can be fetched, the small model in this package takes its place, and a line says so.
    """
    if config.model == "auto" and not config.pretrained and store.exists(output_paths.PLAN):
        planned = load_plan(store).encoder
        config = replace(config, model=planned.model, pretrained=planned.pretrained)
    config = replace(config, extend=True)
    try:
        make_plan(config.input, store.url, config, storage=storage, progress=say)
    except EncoderError as error:
        if config.model != "auto" or config.pretrained:
            raise
        say(str(error))
        say(
            "so the small model in this package is used (--model demo): it was trained on 1,911 emoji, and shows how "
            "everything works rather than what is in photographs; with network, run again with another --output"
        )
        make_plan(config.input, store.url, replace(config, model="demo"), storage=storage, progress=say)
    except PlanError as error:
        if " input" not in str(error).partition(" (")[2]:  # the input is what it was
            raise
        raise PlanError(
            f"{error}; put the input back as it was, or: clip-batch run NEW --output OTHER --no-serve, and clip-batch "
            f"merge --output OTHER/{paths.OUTPUT} --index {quote(index)} --add; "
            f"clip-batch serve --index {quote(index)} serves the old ones"
        ) from None


def renew_changed(store: Store, config: EmbedConfig, storage: StorageConfig, say: Say) -> None:
    """Embed those pictures of folders again that changed since they were embedded.

    The partitions that have them are embedded again as a whole. IncompleteError: one of them fails.
    """
    if load_plan(store).format != "files":
        return
    _, renew = repair(store, [], {CHANGED})
    if not renew:
        return
    partitions = counted(len(renew), "partition")
    say(f"pictures changed since they were embedded: {partitions} with them embedded again")
    outcomes = local.run_worker(store.url, [*renew], replace(config, allow_empty=True), storage, renew)
    if failures := [outcome for outcome in outcomes if outcome.state == "failed"]:
        raise IncompleteError(f"partition {failures[0].partition} failed, so its old rows stay: {failures[0].error}")


def merge_line(output: str, index: str, config: MergeConfig, storage: StorageConfig, say: Say) -> None:
    """Make the index hold OUT as it is now, besides whatever else was added to it.

    An index of OUT alone is built anew while that is cheap, and whenever pictures were embedded again since it got
    their rows, for which it takes all other OUTs too. Otherwise the new rows are added to the live version.
    """
    store, home = Store(output, storage.storage_options), Store(index, storage.storage_options)
    live = live_version(home)
    manifest = load_manifest(home, live) if live else None
    sources = dict.fromkeys(source.output for source in manifest.sources) if manifest else {}
    others = [url for url in sources if url != store.url]
    renewed = manifest is not None and _is_renewed(store, home, manifest)
    if renewed:
        config = replace(config, anew=True)
    elif manifest and (others or manifest.rows > CHEAP_ROWS):
        config = replace(config, add=True)
    merge([*others, output] if renewed else output, index, config, storage=storage, progress=say)


def _is_renewed(store: Store, index: Store, manifest: Manifest) -> bool:
    """Whether pictures of OUT were embedded again since a version of the index got their rows."""
    merged = [source for source in manifest.sources if source.output == store.url]
    slices = [one for source in merged for one in held.read_source(index, source)]
    return bool(held.embedded_again(open_source(store, manifest.encoder, allow_partial=True), slices))


def embed_all(output: str, config: EmbedConfig, storage: StorageConfig, workers: int, say: Say) -> None:
    """Embed what is not committed. Raises IncompleteError if partitions fail.

    Partitions without a row are no error here: the callers say what became of the input.
    """
    config = replace(config, allow_empty=True)
    workers = local.processes(workers, config)
    if workers > 1:
        code = local.run_workers(output, workers, config, storage)
        if code == Preempted.exit_code:
            raise Preempted()
        failed = code != 0
    else:
        outcomes = local.run_worker(output, None, config, storage)
        failures = [outcome for outcome in outcomes if outcome.state == "failed"]
        for outcome in failures:
            say(f"partition {outcome.partition} failed: {outcome.error}")
        failed = bool(failures)
    if failed:
        raise IncompleteError(
            f"partitions of {output} are not embedded: see clip-batch status --output {quote(output)}"
        )


def url_list(specs: Sequence[str], format: str, storage: StorageConfig, say: Say) -> str:
    """The list of URLs that SPECs name; "" where they name images. ConfigError: they name several lists.

    A text file is one if its lines are URLs, none of them of a tar. Other kinds are one where `format` is "auto".
    """
    options = storage.storage_options
    named = list(read_lists(specs, options))
    texts = [spec for spec in specs if spec.endswith((".txt", ".list")) and not spec.startswith("@")]
    lines = len(texts) == len(specs) and not any(
        is_tar(name) or not name.startswith(("http://", "https://")) for name in named
    )
    if not lines and (format != "auto" or detect_format(named, options, say) != "urls"):
        return ""
    if len(specs) > 1:
        raise ConfigError(f"{some(specs)} are lists of URLs: give one, or the folder that they are in")
    return specs[0]


def output_folder(output: str, specs: Sequence[str]) -> str:
    """The folder that `run` writes: `output`, or where that is "" one that is named by the first SPEC.

    Where a run of another SPEC has taken that name (`a.parquet` and the folder `a`), a number follows it.
    ConfigError: it lies in a folder that is input, or has one where embeddings or the index are written.
    """
    folders = [spec for spec in specs if is_local(spec) and os.path.isdir(absolute(spec))]
    folders += [spec for spec in specs if not is_local(spec) and not any(character in spec for character in "*?[{")]
    folder = (output or _free(beside(default_output(specs[0]), folders), specs[0])).rstrip("/") or "/"
    check_apart(folder, [spec for spec in folders if contains(spec, folder)])
    for place in (paths.OUTPUT, paths.INDEX):
        check_apart(f"{folder}/{place}", folders)
    return folder


def _free(folder: str, spec: str) -> str:
    """A folder for the results of a SPEC: this one, or with a number where others have results of another SPEC."""
    names = (f"{folder}-{number}" if number > 1 else folder for number in itertools.count(1))
    return next(name for name in names if _recorded(name) in (None, _absolute(spec)))


def _recorded(folder: str) -> str | None:
    """The first SPEC of the run that wrote a local folder; None where there is none, or it was not recorded."""
    try:
        return str(Store(folder).read_json(paths.RUN)["spec"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def record_spec(folder: str, specs: Sequence[str], storage: StorageConfig) -> None:
    """Record in the folder of a run whose results it has, unless that is recorded already."""
    data = json.dumps({"spec": _absolute(specs[0])}, indent=1).encode()
    Store(folder, storage.storage_options).create(paths.RUN, data)


def _absolute(spec: str) -> str:
    path = spec.removeprefix("@")
    return os.path.realpath(absolute(path)) if is_local(path) else path


def default_output(spec: str) -> str:
    """The folder in the working directory for the results of a SPEC where no --output is given.

    >>> default_output("/home/ann/Pictures"), default_output("s3://bucket/cats/{000..999}.tar"), default_output("a.tar")
    ('clip-batch-Pictures', 'clip-batch-cats', 'clip-batch-a')
    """
    path = (absolute(spec.removeprefix("@")) if is_local(spec) else spec).rstrip("/")
    pattern = not (is_local(path) and os.path.exists(path)) and any(character in path for character in "*?[{")
    while pattern and any(character in path for character in "*?[{"):
        path = path.rpartition("/")[0]
    name = path.rpartition("/")[2]
    stem = tar_stem(name) if is_tar(name) else name.partition(".")[0] or name
    return f"clip-batch-{stem or 'run'}"
