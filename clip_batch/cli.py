"""The command line: `clip-batch COMMAND`. Each command is one function, imported when it is run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from clip_batch.config import (
    EmbedConfig,
    MergeConfig,
    PlanConfig,
    SearchConfig,
    ServeConfig,
    SlurmConfig,
    SparkConfig,
    StorageConfig,
    SubmitConfig,
    SweepConfig,
    TargetConfig,
)
from clip_batch.errors import ClipBatchError, ConfigError

if TYPE_CHECKING:
    import subprocess


@dataclass(frozen=True)
class Options:
    """One instance of each section, filled from flags, environment and file."""

    target: TargetConfig
    storage: StorageConfig
    plan: PlanConfig
    embed: EmbedConfig
    merge: MergeConfig
    sweep: SweepConfig
    submit: SubmitConfig
    slurm: SlurmConfig
    spark: SparkConfig
    search: SearchConfig
    serve: ServeConfig


def plan(options: Options) -> int:
    """Freeze the plan: which tars, in which partitions, by which encoder."""
    from clip_batch.plan import make_plan

    if not options.plan.input:
        raise ConfigError("plan needs --input: paths, URLs, globs or brace patterns of tars")
    made = make_plan(options.plan, _output(options), options.storage, _say)
    shards = {piece.shard.url for partition in made.partitions for piece in partition.slices}
    summary = {"partitions": len(made.partitions), "shards": len(shards), "encoder": made.encoder.fingerprint}
    text = f"planned {len(shards):,} shards in {len(made.partitions):,} partitions: {options.target.output}"
    _answer(options, summary, text)
    return 0


def embed(options: Options) -> int:
    """Embed every uncommitted partition on this machine; with --input, plan first."""
    from clip_batch.launch import local

    if options.plan.input:
        plan(replace(options, target=replace(options.target, json=False)))
    workers = options.target.workers or (local.gpus() if options.embed.device in ("auto", "cuda") else 0)
    if workers <= 1:
        return _report(options, local.run_worker(_output(options), None, options.embed, options.storage))
    return local.run_workers(_output(options), workers, options.embed, options.storage)


def worker(options: Options) -> int:
    """One worker: the partitions given, or those of its slot, that are not committed yet."""
    from clip_batch.launch import local

    target = options.target
    if bool(target.partitions) == (target.slot is not None):
        raise ConfigError("worker needs either --partitions 0,3-5, or --slot I with --slots N or --submission ID")
    numbers = _slot(options) if target.slot is not None else _numbers(target.partitions)
    return _report(options, local.run_worker(_output(options), numbers, options.embed, options.storage))


def _numbers(text: str) -> list[int]:
    from clip_batch.types import parse_numbers

    try:
        return parse_numbers(text)
    except ValueError:
        raise ConfigError(f"--partitions {text!r} is not understood: write it like 0,3-5") from None


def _slot(options: Options) -> list[int]:
    """The partitions of --slot, of a submission or of the whole plan."""
    from clip_batch import submission
    from clip_batch.plan import count_partitions
    from clip_batch.stages.embed import slot_partitions
    from clip_batch.store import Store

    target, store = options.target, Store(_output(options), options.storage.storage_options)
    assert target.slot is not None
    if bool(target.submission) == (target.slots is not None):
        raise ConfigError("--slot needs --slots N, how many workers share the plan, or --submission ID")
    if target.submission:
        return submission.load(store, target.submission).slot(target.slot)
    assert target.slots is not None
    return slot_partitions(count_partitions(store), target.slot, target.slots)


def _report(options: Options, outcomes: Sequence[Any]) -> int:
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    for outcome in failed:
        print(f"partition {outcome.partition} failed: {outcome.error}", file=sys.stderr)
    rows, bad = sum(outcome.rows for outcome in outcomes), sum(outcome.failed for outcome in outcomes)
    text = f"{len(outcomes) - len(failed)} partitions done, {rows:,} samples embedded, {bad:,} listed as failed"
    _answer(options, [asdict(outcome) for outcome in outcomes], text)
    return 1 if failed else 0


def submit_slurm(options: Options) -> int:
    """Launch what is missing as SLURM job arrays; with --index, a merge behind them."""
    from clip_batch.launch import submit

    return submit.slurm(_request(options), options.slurm, main, _say)


def submit_spark(options: Options) -> int:
    """Launch what is missing as a Spark application; with --index, merge in it too."""
    from clip_batch.launch import submit

    return submit.spark(_request(options), options.spark, _say)


def _request(options: Options) -> Any:
    from clip_batch.launch.submit import Request

    index = _index(options) if options.target.index else ""
    return Request(_output(options), index, options.storage, options.submit, options.embed, options.merge)


def status(options: Options) -> int:
    """Done, failed, missing, rate, ETA, and the command that relaunches what is missing."""
    from clip_batch.stages.status import describe, status
    from clip_batch.store import Store

    found = status(Store(_output(options), options.storage.storage_options))
    _answer(options, found, describe(found))
    return 0


def verify(options: Options) -> int:
    """Prove that OUT, or an index, is complete and sound; exit 1 and the names of what is not."""
    from clip_batch.stages.verify import verify_index, verify_output
    from clip_batch.store import Store

    store_options = options.storage.storage_options
    if options.target.index:
        report = verify_index(Store(_index(options), store_options), options.target.deep)
    else:
        report = verify_output(Store(_output(options), store_options), options.target.deep, store_options)
    for name, problem in report.problems.items():
        print(f"{name}: {problem}", file=sys.stderr)
    proof = "deep" if options.target.deep else "quick"
    text = f"{report.checked - len(report.problems)} of {report.checked} sound ({proof}), {report.rows:,} rows"
    text += f", {report.failed:,} listed as failed" if report.failed else ""
    _answer(options, {"ok": report.ok, **asdict(report)}, text)
    return 0 if report.ok else 1


def repair(options: Options) -> int:
    """Run again only what verify names."""
    from clip_batch.launch import local
    from clip_batch.stages.repair import repair
    from clip_batch.stages.verify import verify_output
    from clip_batch.store import Store

    store_options = options.storage.storage_options
    store = Store(_output(options), store_options)
    numbers = repair(store, verify_output(store, options.target.deep, store_options).problems)
    return _report(options, local.run_worker(_output(options), numbers, options.embed, options.storage))


def gc(options: Options) -> int:
    """Remove what no commit names."""
    from clip_batch.stages.repair import gc
    from clip_batch.store import Store

    removed = gc(Store(_output(options), options.storage.storage_options), options.target.everything)
    _answer(options, removed, f"{len(removed)} files removed")
    return 0


def merge(options: Options) -> int:
    """Build sharded indices and metadata in index order, and measure their recall."""
    from clip_batch.job import open_job
    from clip_batch.stages import merge as stage

    task, slot, slots = options.target.task, options.target.slot, options.target.slots
    if {slot is None, slots is None} != {task != "shards"}:
        raise ConfigError("merge --task shards needs --slot I and --slots N; the other tasks take neither")
    if slot is not None and slots is not None and not 0 <= slot < slots:
        raise ConfigError(f"merge --slot {slot} of --slots {slots} does not exist: slots count from 0 to {slots - 1}")
    job = open_job(_output(options), _index(options), options.merge, options.storage)
    manifest = stage.finished(job, _say)
    if manifest is None and task in ("all", "train"):
        stage.train(job, _say)
    if manifest is None and task in ("all", "shards"):
        for shard in range(slot or 0, job.shards, slots or 1):
            stage.build_shard(job, shard, _say)
    if manifest is None and task in ("all", "manifest"):
        manifest = stage.publish(job, _say)
    if manifest is None:
        summary = {"task": task, "version": job.version, "index_shards": job.shards}
        _answer(options, summary, f"{task} done of version {job.version}, which has {job.shards} index shards")
        return 0
    text = f"merged {manifest.rows:,} rows into {len(manifest.shards)} index shards: {options.target.index[0]}"
    _answer(options, json.loads(manifest.to_json()), text)
    return 0


def search(options: Options) -> int:
    """Search an index with a text, an image or a vector."""
    from clip_batch.stages.search import Searcher, describe_hits

    how = _one_query(options)
    with Searcher(_index(options), options.storage, config=how) as searcher:
        hits = searcher.search(_query(searcher, options.target), how.k, how.modality, how.effort)[0]
    hits = [hit for hit in hits if how.threshold is None or hit.score >= how.threshold]
    _answer(options, [asdict(hit) for hit in hits], describe_hits(hits))
    return 0


def filter(options: Options) -> int:
    """Every row over a --threshold, or the k best, as Parquet in OUTPUT; their images too, if asked."""
    from clip_batch.filter import filter_rows
    from clip_batch.stages.search import Searcher
    from clip_batch.store import Store

    how = _one_query(options)
    with Searcher(_index(options), options.storage, config=how) as searcher:
        store, query = Store(_output(options), options.storage.storage_options), _query(searcher, options.target)
        done = filter_rows(
            searcher, query, store, how.k, how.threshold, how.modality, how.effort, options.target.images
        )
    text = f"{done.rows:,} rows, {done.images:,} images: {options.target.output}"
    text += f"; {done.missing:,} images are not in a tar that can be read" if done.missing else ""
    _answer(options, asdict(done), text)
    return 0


def _one_query(options: Options) -> SearchConfig:
    """How to search, once there is one thing to search for."""
    target = options.target
    if sum(bool(value) for value in (target.text, target.image, target.embedding)) != 1:
        raise ConfigError("a search needs one of --text, --image and --embedding")
    return options.search


def _query(searcher: Any, target: TargetConfig) -> Any:
    import numpy as np

    from clip_batch.store import read_url

    if target.text:
        return searcher.encode_text([target.text])
    if target.image:
        return searcher.encode_image(read_url(target.image, searcher.storage.storage_options))
    try:
        return np.load(target.embedding)
    except ValueError as error:
        raise ConfigError(f"--embedding {target.embedding} is no .npy file of numbers: {error}") from None


def versions(options: Options) -> int:
    """The versions of an index, and which one is live; --use makes another one live."""
    from clip_batch.stages import versions as stage
    from clip_batch.store import Store

    store = Store(_index(options), options.storage.storage_options)
    if options.target.use:
        stage.use(store, options.target.use)
    if options.target.drop:
        stage.drop(store, options.target.drop)
    found = stage.versions(store)
    _answer(options, [asdict(one) for one in found], stage.describe(found))
    return 0


def remove(options: Options) -> int:
    """Remove rows from every search, now and in later versions, by a list of keys."""
    from clip_batch.stages import versions as stage

    if not options.target.keys:
        raise ConfigError("remove needs --keys FILE: one value of --column a line")
    target = options.target
    report = stage.remove(_index(options), target.keys, target.column, options.storage, _say)
    text = f"{report.rows:,} rows of the live version removed by {report.values:,} values of {target.column}"
    if report.missing:
        text += f"; {report.missing:,} values have no row in it, such as {', '.join(report.examples)}"
    _answer(options, asdict(report), text)
    return 0


def sweep(options: Options) -> int:
    """Try index keys on a sample of OUT: recall, ms a query, bytes a vector, and which one to take."""
    from clip_batch.stages import sweep as stage

    found = stage.sweep(_output(options), options.merge, options.storage, options.sweep, _say)
    _answer(options, asdict(found), stage.describe(found))
    return 0


def export_clip_retrieval(options: Options) -> int:
    """Write an index folder that clip-retrieval's own service serves."""
    from clip_batch.export.clip_retrieval import export_clip_retrieval

    if not options.target.to:
        raise ConfigError("export needs --to FOLDER")
    export_clip_retrieval(_index(options), options.target.to, options.storage, _say)
    return 0


def serve(options: Options) -> int:
    """Serve indices over HTTP, with a web page."""
    from clip_batch.serve.app import run

    if not options.target.index:
        raise ConfigError("serve needs --index INDEX, or several as NAME=INDEX")
    run(options.target.index, options.serve, options.storage)
    return 0


def doctor(options: Options) -> int:
    """Check this machine, the storage and the plan before a long run; or measure, with --calibrate."""
    from clip_batch.doctor import Check, doctor

    if options.target.calibrate:
        return _calibrate(options)
    here = not options.target.on_node or "SLURM_JOB_ID" in os.environ
    checks = doctor(options.target.output or None, options.storage, options.target.on_node) if here else []
    if not here:
        checks = [Check(**check) for check in _doctor_on_node(options)]
    marks = {True: "ok  ", False: "FAIL", None: "info"}
    _answer(
        options, [asdict(check) for check in checks], "\n".join(f"{marks[c.ok]} {c.name}: {c.message}" for c in checks)
    )
    return 1 if any(check.ok is False for check in checks) else 0


def _doctor_on_node(options: Options) -> list[dict[str, Any]]:
    """The report of a compute node."""
    output = ["--output", options.target.output] if options.target.output else []
    try:
        found: list[dict[str, Any]] = json.loads(_on_node(options, ["--json", *output], capture=True).stdout)
    except ValueError as error:
        raise ConfigError(f"the doctor did not report from a node ({error}): see what srun says above") from None
    return found


def _calibrate(options: Options) -> int:
    """Measure what embed is bound by, here or on a compute node."""
    from clip_batch.launch import local
    from clip_batch.stages.calibrate import calibrate, describe

    output, workers = _output(options), options.target.slots or 1
    if options.target.on_node and "SLURM_JOB_ID" not in os.environ:
        flags = ["--calibrate", "--output", output, "--slots", str(workers)]
        return _on_node(options, [*flags, "--json"] if options.target.json else flags).returncode
    config = replace(options.embed, threads=options.embed.threads or local.cores())
    found = calibrate(output, config, options.storage, workers)
    _answer(options, asdict(found), describe(found))
    return 0


def _on_node(options: Options, flags: list[str], capture: bool = False) -> subprocess.CompletedProcess[str]:
    """`doctor` run on a compute node, with this one's options in its environment, where credentials are safe."""
    import subprocess

    from clip_batch.launch import local, slurm

    command = slurm.on_node(options.slurm, ["doctor", "--on-node", *flags])
    _say(f"waiting for a node: {' '.join(command)}")
    environment = local.environment(options.embed, options.storage)
    try:
        return subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, env=environment)
    except OSError as error:
        raise ConfigError(f"no node can be asked ({error}): srun must be on PATH") from None


def demo(options: Options) -> int:
    """The whole line on embedded pictures with an embedded model: tars, plan, embed, merge, search."""
    from clip_batch.demo.run import run

    return run(options.target.folder, options.target.serve, options.serve)


@dataclass(frozen=True)
class Command:
    """A command's function, its sections' flags, and the fields of TargetConfig it takes."""

    run: Callable[[Options], int]
    fields: tuple[str, ...]
    sections: tuple[type, ...] = ()


COMMANDS: dict[str, Command] = {
    "demo": Command(demo, ("serve",), (ServeConfig,)),
    "plan": Command(plan, ("output", "json"), (PlanConfig,)),
    "embed": Command(embed, ("output", "workers", "json"), (EmbedConfig, PlanConfig)),
    "worker": Command(worker, ("output", "partitions", "slot", "slots", "submission", "json"), (EmbedConfig,)),
    "submit slurm": Command(submit_slurm, ("output", "index"), (SubmitConfig, SlurmConfig, EmbedConfig, MergeConfig)),
    "submit spark": Command(submit_spark, ("output", "index"), (SubmitConfig, SparkConfig, EmbedConfig, MergeConfig)),
    "status": Command(status, ("output", "json")),
    "verify": Command(verify, ("output", "index", "deep", "json")),
    "repair": Command(repair, ("output", "deep", "json"), (EmbedConfig,)),
    "gc": Command(gc, ("output", "everything", "json")),
    "merge": Command(merge, ("output", "index", "task", "slot", "slots", "json"), (MergeConfig,)),
    "sweep": Command(sweep, ("output", "json"), (SweepConfig, MergeConfig)),
    "versions": Command(versions, ("index", "use", "drop", "json")),
    "remove": Command(remove, ("index", "keys", "column", "json")),
    "export clip-retrieval": Command(export_clip_retrieval, ("index", "to")),
    "search": Command(search, ("index", "text", "image", "embedding", "json"), (SearchConfig,)),
    "filter": Command(filter, ("index", "text", "image", "embedding", "output", "images", "json"), (SearchConfig,)),
    "serve": Command(serve, ("index",), (ServeConfig,)),
    "doctor": Command(doctor, ("output", "on_node", "calibrate", "slots", "json"), (EmbedConfig, SlurmConfig)),
}


def _output(options: Options) -> str:
    if not options.target.output:
        raise ConfigError("--output OUT is needed: the embeddings folder")
    return options.target.output


def _index(options: Options) -> str:
    if len(options.target.index) != 1:
        raise ConfigError("--index INDEX is needed, once: the index folder")
    return options.target.index[0]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _answer(options: Options, value: Any, text: str) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False) if options.target.json else text, flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help lists the flags")


def _parser(name: str, command: Command) -> _Parser:
    from clip_batch import options

    parser = _Parser(prog=f"clip-batch {name}", description=command.run.__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; see configs/reference.yaml")
    parser.add_argument("--debug", action="store_true", help="show a traceback where an error is raised")
    if name == "demo":
        parser.add_argument("folder", nargs="?", default=argparse.SUPPRESS, help=options.helps(TargetConfig)["folder"])
    options.add_flags(parser, TargetConfig, command.fields)
    for section in (*command.sections, StorageConfig):
        options.add_flags(parser, section)
    if name in ("search", "filter"):
        parser.add_argument("-k", dest="k", default=argparse.SUPPRESS, help="short for --k")
    return parser


def _usage() -> str:
    lines = ["usage: clip-batch COMMAND [--help] ...", "", (__doc__ or "").split("\n")[0], ""]
    lines += [f"  {name:<23}{(command.run.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    lines += ["", "Exit codes: 0 all committed; 1 something failed; 2 usage or configuration; 75 run again."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from clip_batch import __version__

        print(f"clip-batch {__version__}")
        return 0
    debug = "--debug" in arguments
    name, *rest = arguments
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name = f"{name} {rest.pop(0)}"
    try:
        return _run(name, rest)
    except ClipBatchError as error:
        if debug:
            raise
        print(f"clip-batch {name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug:
            raise
        print(f"clip-batch {name}: {error} (--debug shows where)", file=sys.stderr)
        return 1


def _run(name: str, arguments: list[str]) -> int:
    if kinds := [command for command in COMMANDS if command.startswith(f"{name} ")]:
        raise ConfigError(f"say which: clip-batch {', or clip-batch '.join(kinds)}; see --help of each")
    if name not in COMMANDS:
        raise ConfigError(f"no such command; the commands are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    flags = vars(_parser(name, command).parse_args(arguments))
    from clip_batch import options

    file = options.read_file(flags["config"]) if flags["config"] else {}
    used = (TargetConfig, StorageConfig, *command.sections)

    def fill(section: type) -> Any:
        return options.gather(section, flags, file) if section in used else section()

    filled = Options(
        target=fill(TargetConfig),
        storage=fill(StorageConfig),
        plan=fill(PlanConfig),
        embed=fill(EmbedConfig),
        merge=fill(MergeConfig),
        sweep=fill(SweepConfig),
        submit=fill(SubmitConfig),
        slurm=fill(SlurmConfig),
        spark=fill(SparkConfig),
        search=fill(SearchConfig),
        serve=fill(ServeConfig),
    )
    return command.run(filled)
