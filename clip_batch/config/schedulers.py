"""The options of `submit`, which hands work to a scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from clip_batch.config.fields import Options, documented
from clip_batch.config.values import Count


@documented
@dataclass(frozen=True)
class SubmitConfig(Options):
    """How the missing partitions are distributed to the tasks of a scheduler, SLURM or Spark."""

    tasks: int = 0
    """Tasks that share the missing partitions; 0: one per partition, at most 1,000."""
    merge_tasks: Count = 4
    """Tasks that share the index shards, if `submit` is given --index."""
    wait: bool = False
    """Wait until no job of the submission is left; the exit code is 0 only if everything is committed."""
    dry_run: bool = False
    """Print exactly what would be run, and run nothing."""


@documented
@dataclass(frozen=True)
class SlurmConfig(Options):
    """The resources of SLURM jobs; an empty value means the cluster's own default."""

    logs: str = ""
    """Folder of logs and pickles, seen by every node; default: OUT/_clip_batch/logs, or ./clip-batch-logs."""
    concurrency: Count = 256
    """Largest number of array tasks that run at the same time."""
    slurm_partition: str = ""
    """SLURM partition (queue) of the tasks."""
    account: str = ""
    """Account that is charged."""
    qos: str = ""
    """Quality of service of the tasks."""
    time: Count = 240
    """Minutes that an embed task may run; what it has not finished continues after a requeue."""
    grace: int = 120
    """Seconds between a task's warning and its time limit; a batch must finish within them."""
    timeouts: int = 20
    """How often a task may be requeued because its time was up."""
    nodes: Count = 1
    """Nodes of a task; with tasks_per_node, each of their processes is a worker."""
    tasks_per_node: Count = 1
    """Workers on each node of a task; for whole nodes, the number of their GPUs."""
    gpus_per_task: int = 0
    """GPUs of a worker; 0: none are requested, except by `gres`."""
    gres: str = ""
    """Generic resources in SLURM's notation, such as gpu:a100:1, instead of gpus_per_task."""
    cpus_per_task: Count = 1
    """Cores of a worker."""
    memory: str = ""
    """Memory of a task on each node, such as 32GB."""
    exclusive: bool = False
    """Request whole nodes."""
    constraint: str = ""
    """Node features that are required."""
    nodelist: str = ""
    """Nodes that must be used."""
    exclude: str = ""
    """Nodes that must not be used."""
    comment: str = ""
    """Comment of the jobs."""
    requeue: bool = True
    """Let SLURM requeue a task whose node fails or is preempted."""
    mail_user: str = ""
    """Address that SLURM sends mail to."""
    mail_type: str = ""
    """Events that SLURM sends mail about: BEGIN, END, FAIL, ALL."""
    container: Literal["", "pyxis", "apptainer"] = ""
    """Run tasks in a container, with SLURM's pyxis plug-in or with apptainer; default: no container."""
    container_image: str = ""
    """Image of the container."""
    container_mounts: str = ""
    """Mounts of the container, in the notation of its runtime: /data:/data,/scratch."""
    container_python: str = "python3"
    """Python inside the container that has clip-batch."""
    setup: list[str] = field(default_factory=list)
    """Shell lines to run before a task, such as "module load cuda"."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Further sbatch options, as JSON: {"reservation": "night"}."""
    merge_time: Count = 720
    """Minutes that a merge task may run."""
    merge_cpus: Count = 8
    """Cores of a merge task."""
    merge_memory: str = "64GB"
    """Memory of a merge task; it must fit `shard_rows`."""
    merge_partition: str = ""
    """SLURM partition of the merge tasks, which need no GPU; default: slurm_partition."""


@documented
@dataclass(frozen=True)
class SparkConfig(Options):
    """How spark-submit is called; what is not given here comes from Spark's own spark-defaults.conf."""

    master: str = ""
    """spark://host:7077, yarn, k8s://... or local-cluster[2,1,1024]; default: Spark's own."""
    deploy_mode: Literal["", "client", "cluster"] = ""
    """Where the driver runs: here (client) or in the cluster; default: Spark's own."""
    app_name: str = "clip-batch"
    """Name of the application."""
    properties_file: str = ""
    """Properties file to use instead of Spark's own spark-defaults.conf; see spark/spark-defaults.conf."""
    archives: str = ""
    """Environment for the executors, packed by conda-pack or venv-pack: env.tar.gz#environment."""
    spark_conf: dict[str, Any] = field(default_factory=dict)
    """Further Spark properties, as JSON: {"spark.executor.instances": 64}."""
    spark_submit: str = "spark-submit"
    """The spark-submit command."""
