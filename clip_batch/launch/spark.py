"""Spark: executors run the same worker; Spark carries slot numbers to them and brings back a status of each partition.

    command, submit      the spark-submit command line, and running it on this machine
    drive                what the driver does: freeze a submission, `drain` it, `merge_on_spark`
    drain                one Spark task for each slot of the submission; OUT's commits remain the truth
    merge_on_spark       train (one task) -> index shards (several tasks) -> manifest (one task)

Spark aborts a whole job once one of its tasks has failed spark.task.maxFailures times.
`spark_executor.embed_slot` never lets a task fail that often.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_batch import errors
from clip_batch.config import EmbedConfig, MergeConfig, SparkConfig, StorageConfig, SubmitConfig
from clip_batch.config.options import to_flags
from clip_batch.embeddings import submission
from clip_batch.errors import ConfigError, ConflictError, IncompleteError, one_line
from clip_batch.index.manifest import Manifest, load_manifest
from clip_batch.index.publications import TRIES
from clip_batch.launch.spark_executor import EmbedTask, PartitionStatus, embed_slot, merge_task
from clip_batch.storage.paths import absolute
from clip_batch.storage.store import Store
from clip_batch.types import counted

if TYPE_CHECKING:
    import pyarrow as pa

STORAGE = "CLIP_BATCH_STORAGE_OPTIONS"
"""The variable that passes storage options to the driver; executors get them in the pickled task."""

DRIVER = str(Path(__file__).parent.parent / "cli/spark_driver.py")
"""The file that spark-submit runs as the driver."""


def drain(
    spark: Any, output: str, submission_id: str, config: EmbedConfig, storage: StorageConfig = StorageConfig()
) -> list[PartitionStatus]:
    """Embed a submission's partitions on the executors; returns the status of each partition, in order.

    Slots with partitions that failed because of a machine or the store (`again`) are run again, all together, as
    long as that commits anything. PlanError: there is no such submission.
    """
    context = spark.sparkContext
    frozen = submission.load(Store(output, storage.storage_options), submission_id)
    task = EmbedTask(absolute(output), frozen, config, storage, context.applicationId, _tries(context))
    statuses: dict[int, PartitionStatus] = {}
    slots = list(range(frozen.slots))
    while slots:
        before = _committed(statuses)
        context.setJobDescription(f"clip-batch embed: {len(slots)} slots of submission {submission_id}")
        for row in _map(spark, functools.partial(embed_slot, task, slots), len(slots)):
            statuses[row["partition"]] = PartitionStatus(**row)
        if _committed(statuses) == before:
            break
        slots = [slot for slot in slots if any(statuses[number].again for number in frozen.slot(slot))]
    return [statuses[number] for number in sorted(statuses)]


def _committed(statuses: dict[int, PartitionStatus]) -> int:
    return sum(status.state == "committed" for status in statuses.values())


def _tries(context: Any) -> int:
    """How often a task may fail before Spark aborts the job; in local mode the master says it, "local[2,4]"."""
    if local := re.fullmatch(r"local(\[[^,\]]*(,\s*(\d+))?\])?", context.master):
        return int(local[3] or 1)
    return int(context.getConf().get("spark.task.maxFailures", "4"))


def _map(spark: Any, task: Callable[[int], Iterable[Any]], count: int) -> list[Any]:
    """The values that `task(i)` returns for each i in range(count), each in a Spark task of its own.

    Values travel as JSON. IncompleteError: Spark aborts the job.
    """
    from py4j.protocol import Py4JError  # type: ignore[import-untyped]
    from pyspark.errors import PySparkException

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        for batch in batches:
            for number in batch.column(0).to_pylist():
                answers = pa.array([json.dumps(answer) for answer in task(number)], pa.string())
                yield pa.RecordBatch.from_arrays([answers], names=["answer"])

    try:
        rows = spark.range(0, count, 1, count).mapInArrow(run, "answer string").collect()
    except (Py4JError, PySparkException) as error:
        reason = one_line(error, 400)
        raise IncompleteError(f"Spark aborted the job: {reason} ... what is committed stays, run it again") from None
    return [json.loads(row.answer) for row in rows]


def merge_on_spark(
    spark: Any, output: str, index: str, config: MergeConfig, storage: StorageConfig = StorageConfig(), tasks: int = 4
) -> Manifest:
    """Merge on the executors: train, build the index shards in at most `tasks` tasks, and publish the version.

    Each task skips what is done already; with `add` they begin again where another version goes live meanwhile. Raises
    what `clip_batch.merge` raises.
    """
    merge = functools.partial(merge_task, absolute(output), absolute(index), config, storage)

    def run(task: str, count: int) -> dict[str, Any]:
        spark.sparkContext.setJobDescription(f"clip-batch merge: {task} of {index}")
        answers = _map(spark, functools.partial(merge, task, count), count)
        for answer in answers:
            if "error" in answer:
                raise getattr(errors, answer["error"])(answer["message"])
        return dict(answers[0])

    def run_all() -> Manifest:
        job = run("train", 1)
        run("shards", max(1, min(tasks, job["shards"])))
        return load_manifest(Store(index, storage.storage_options), run("manifest", 1)["version"])

    for _ in range(TRIES if config.add else 0):
        with contextlib.suppress(ConflictError):  # another version went live meanwhile: begin again from it
            return run_all()
    return run_all()


def drive(
    output: str,
    index: str,
    submission_id: str,
    submit: SubmitConfig,
    embed: EmbedConfig,
    merge: MergeConfig,
    storage: StorageConfig,
) -> int:
    """Drain a submission, then merge into `index` unless that is ""; returns the exit code.

    Without a submission, it freezes one of everything that is missing.
    """
    from pyspark.sql import SparkSession

    id = submission_id or _freeze(Store(output, storage.storage_options), embed, submit.tasks)
    spark = SparkSession.builder.getOrCreate()
    try:
        statuses = drain(spark, output, id, embed, storage) if id else []
        failed = [status for status in statuses if status.state == "failed"]
        for status in failed:
            print(f"partition {status.partition} failed: {status.error}", file=sys.stderr)
        empty = [status for status in statuses if status.empty]
        for status in empty:
            print(f"partition {status.partition} is committed without a row: {status.empty}", file=sys.stderr)
        rows, bad = sum(status.rows for status in statuses), sum(status.failed for status in statuses)
        done = f"{len(statuses) - len(failed)} of {len(statuses)} partitions committed"
        print(f"{done}, {counted(rows, 'sample')} embedded, {bad:,} listed as failed", flush=True)
        if index:
            manifest = merge_on_spark(spark, output, index, merge, storage, submit.merge_tasks)
            print(f"merged {manifest.rows:,} rows into {len(manifest.shards)} index shards: {index}", flush=True)
        return 1 if failed or (empty and not embed.allow_empty) else 0
    finally:
        spark.stop()


def _freeze(store: Store, config: EmbedConfig, tasks: int) -> str:
    """The id of a new submission of everything that is missing; "" where nothing is."""
    if not (missing := submission.missing(store)):
        return ""
    line = ["spark-submit", sys.argv[0], "--output", store.url, *to_flags(config)]
    draft = submission.draft(missing, "spark", tasks, 1, shlex.join(line))
    submission.publish(store, draft)
    return draft.id


def command(config: SparkConfig, arguments: Sequence[str]) -> list[str]:
    """The exact spark-submit command line of a driver with these arguments."""
    named = {
        "--master": config.master,
        "--deploy-mode": config.deploy_mode,
        "--name": config.app_name,
        "--properties-file": config.properties_file,
        "--archives": config.archives,
    }
    words = [_spark_submit(config.spark_submit)]
    words += [word for flag, value in named.items() if value for word in (flag, value)]
    for key, value in {**_pythons(config), **config.spark_conf}.items():
        words += ["--conf", f"{key}={str(value).lower() if isinstance(value, bool) else value}"]
    return [*words, DRIVER, *arguments]


def _pythons(config: SparkConfig) -> dict[str, str]:
    """The settings of the Python that runs the driver and the executors; the cluster's own Python where none is set."""
    settings = {} if config.deploy_mode == "cluster" else {"spark.pyspark.driver.python": sys.executable}
    if config.archives:
        path, _, name = config.archives.split(",")[0].partition("#")
        settings["spark.pyspark.python"] = f"./{name or os.path.basename(path)}/bin/python"
    elif not config.master or config.master.startswith(("local", "spark:")):
        settings["spark.pyspark.python"] = sys.executable
    return settings


def _spark_submit(name: str) -> str:
    """The name itself if it is on PATH, otherwise the path of the installed pyspark's spark-submit, if there is one."""
    if shutil.which(name) or not (spec := importlib.util.find_spec("pyspark")) or not spec.origin:
        return name
    return str(Path(spec.origin).parent / "bin" / name)


def submit(command: Sequence[str]) -> int:
    """Run a spark-submit command line, whose output passes through; returns its exit code.

    Of this process's CLIP_BATCH_ variables, the driver inherits only the storage options: its arguments carry the other
    options. ConfigError: there is no spark-submit.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CLIP_BATCH_")}
    if STORAGE in os.environ:
        environment[STORAGE] = os.environ[STORAGE]
    try:
        return subprocess.run(command, env=environment, check=False).returncode
    except FileNotFoundError:
        raise ConfigError(f"no {command[0]}: pip install 'clip-batch[spark]', or name it by --spark-submit") from None
