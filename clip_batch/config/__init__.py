"""Every option, declared once: one frozen dataclass per stage.

Flags, YAML keys, environment names (CLIP_BATCH_<FIELD>), `--help`, configs/reference.yaml and
docs/config.md all derive from these fields; a field's help is the string beneath it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class StorageConfig:
    """How stores are opened; every command takes these."""

    storage_options: dict[str, Any] = field(default_factory=dict)
    """Options for fsspec, as JSON: applied to every remote URL. Never written to plan or logs."""
    index_cache: str = "100GB"
    """Disk (in $XDG_CACHE_HOME/clip_batch) for copies of remote indices; versions not in use go first."""


@dataclass(frozen=True)
class DownloadConfig:
    """Download the images of a URL list with img2dataset; see docs/end2end.md."""

    urls: str = ""
    """The list: a Parquet, CSV, TSV, JSON, JSONL or text file, a folder of them, or what `filter` wrote."""
    url_column: str = "url"
    """Its column of URLs."""
    caption_column: str = "caption"
    """Its column of captions; without a column `caption` there are none."""
    save_columns: list[str] = field(default_factory=list)
    """More of its columns that go into the metadata."""
    img2dataset: str = "img2dataset"
    """The img2dataset to run, best in an environment of its own."""
    image_size: int = 256
    """Pixels that images are resized to, in the way of `resize_mode`."""
    resize_mode: Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"] = "keep_ratio"
    """keep_ratio: the shorter side becomes `image_size`, which suits CLIP; border: a padded square; no: not resized."""
    shard_samples: int = 10_000
    """URLs of a tar: what is downloaded again after a kill, at the most, by each process."""
    download_processes: int = 0
    """Processes that download and resize, a tar each; 0: one a core."""
    download_threads: int = 64
    """Downloads at once of each process."""
    timeout: float = 10.0
    """Seconds without a byte after which a download has failed."""
    retries: int = 1
    """How often a failed download is tried again."""
    img2dataset_options: dict[str, Any] = field(default_factory=dict)
    """More of img2dataset's options, as JSON: {"min_image_size": 64, "user_agent_token": "example"}."""


@dataclass(frozen=True)
class PlanConfig:
    """Freeze what is to be embedded, by which encoder, in which partitions."""

    input: list[str] = field(default_factory=list)
    """Tars: paths, URLs, globs, brace patterns ({000..999}), @FILE lists; or folders."""
    format: Literal["tar", "files"] = "tar"
    """tar: webdataset tars; files: folder trees of images with .txt and .json beside them."""
    model: str = "ViT-B-32"
    """open_clip's name, `hf:...`, `timm:...`, `cn-clip:...`, `mclip:...`, `onnx:...`; `demo`: see docs/models.md."""
    pretrained: str = ""
    """open_clip's tag of pretrained weights, or the path or URL of a checkpoint; many families need none."""
    preprocess: Literal["fast", "exact", "scaled"] = "fast"
    """exact: the model's own transform, bit for bit; fast: nearly so; scaled: for large JPEGs; see docs/formats.md."""
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Number format of the model's weights and arithmetic; int8: of its image side, on a CPU, captions in fp32."""
    partition_bytes: str = "4GB"
    """Target size of a partition's tars; a larger tar is split at sample boundaries."""
    partition_samples: int | None = None
    """Target samples of a partition, instead of bytes."""
    partition_count: int | None = None
    """Number of partitions, instead of a target size."""
    image_extensions: list[str] = field(default_factory=lambda: ["jpg", "jpeg", "png", "webp"])
    """Extensions of image members, in any case; where a sample has several, the first listed is taken."""
    caption_extensions: list[str] = field(default_factory=lambda: ["txt"])
    """Extensions of caption members, likewise."""


@dataclass(frozen=True)
class EmbedConfig:
    """Embed what the plan has and no commit has yet."""

    batch_size: int = 0
    """Images a forward pass; 0: 256 on a GPU, 32 on a CPU."""
    threads: int = 0
    """Decoding threads of a worker; 0: the cores it may use, shared among local workers."""
    prefetch: str = "4GB"
    """Disk (in TMPDIR) for remote tars that a worker fetches ahead; one slice ahead is always fetched."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    compile: bool = False
    """Compile the image tower first, once a worker: the same vectors, sooner; see docs/formats.md for what it needs."""
    share: bool = True
    """When a slot is done, take partitions of slower workers that are at work; see docs/decisions.md."""
    max_pixels: int = 178_956_970
    """Images with more pixels are refused before they are decoded (Pillow's own limit)."""
    max_bad_share: float = 1.0
    """A partition fails when more than this share of its samples fails; 1.0: never."""
    broken_shard: Literal["record", "fail"] = "record"
    """A shard that is not a readable tar: record it among the failures, or fail its partition."""
    compression: Literal["zstd", "snappy", "none"] = "zstd"
    """Of the metadata Parquet files."""
    progress: bool = True
    """Show progress on standard error."""


@dataclass(frozen=True)
class MergeConfig:
    """Build sharded indices and Arrow metadata in index order."""

    modalities: list[Literal["image", "text"]] = field(default_factory=lambda: ["image", "text"])
    """Which indices to build; both share rows and metadata."""
    shard_rows: int = 0
    """Rows of an index shard at the most; 0: as many as max_memory allows, up to 5,000,000."""
    max_memory: str = "8GB"
    """Memory that a merge task may take; see docs/merge.md for what it needs."""
    index_key: str = "auto"
    """faiss factory string; auto: Flat for small sets, else autofaiss's choice for index_memory."""
    index_memory: str = "8GB"
    """Memory that the whole index may take when served: what autofaiss chooses by."""
    rerank: int = 0
    """Keep float16 vectors beside the index, and score this many times k candidates exactly; 0: no."""
    layout: Literal["shards", "single"] = "shards"
    """single: join the shards of an IVF index in one file that is searched from disk."""
    made_by: list[str] = field(default_factory=lambda: ["ViT-B-32-quickgelu", "openai"])
    """Of a folder that clip-retrieval wrote, which does not tell: open_clip's names of model and weights."""
    add: bool = False
    """Add OUT to the live version, in new shards of its trained template, instead of building anew."""
    dedup: float = 0.0
    """Leave out rows whose vector has this cosine or more with an earlier row's; 1: equal vectors; 0: keep all."""
    flat_rows: int = 50_000
    """Up to this many rows, auto means Flat (exact)."""
    train_rows: int = 0
    """Rows drawn from all partitions to train on; 0: 64 a list, at least 10,000."""
    queries: int = 500
    """Held-out queries that recall is measured with."""
    recall_target: float = 0.95
    """recall@10 that search parameters are tuned for."""
    allow_partial: bool = False
    """Merge though partitions are missing; the manifest records which."""
    seed: int = 0
    """Of every random draw."""


@dataclass(frozen=True)
class SweepConfig:
    """Try index keys on a sample of OUT, before a merge."""

    keys_to_try: list[str] = field(default_factory=list)
    """faiss factory strings; default: one of each kind that may fit. {} stands for the number of lists."""
    sample: int = 200_000
    """Rows of OUT to try them on."""


@dataclass(frozen=True)
class SubmitConfig:
    """How the missing partitions are dealt to a scheduler's tasks; of both schedulers."""

    tasks: int = 0
    """Tasks that share the missing partitions; 0: one a partition, 1,000 at the most."""
    merge_tasks: int = 4
    """Tasks that share the index shards, where `submit` is given --index."""
    wait: bool = False
    """Wait until the scheduler has no more of it; exit 0 only if all is committed."""
    dry_run: bool = False
    """Print exactly what would be run, and run nothing."""


@dataclass(frozen=True)
class SlurmConfig:
    """The resources of SLURM jobs; empty means the cluster's own default."""

    logs: str = ""
    """Folder of logs and pickles, seen by every node; default: OUT/_clip_batch/logs, or ./clip-batch-logs."""
    concurrency: int = 256
    """Array tasks that run at the same time."""
    slurm_partition: str = ""
    """SLURM partition (queue)."""
    account: str = ""
    """Account that is charged."""
    qos: str = ""
    """Quality of service."""
    time: int = 240
    """Minutes an embed task may take; what it has not finished by then goes on after a requeue."""
    grace: int = 120
    """Seconds before the time limit at which a task is warned: it must finish one batch in them."""
    timeouts: int = 20
    """How often a task may be requeued because its time was up."""
    nodes: int = 1
    """Nodes of a task; with tasks_per_node, each of their processes is a worker."""
    tasks_per_node: int = 1
    """Workers on each node of a task: the GPUs of a node that you take as a whole."""
    gpus_per_task: int = 0
    """GPUs of a worker; 0: none asked for (or see gres)."""
    gres: str = ""
    """Generic resources in SLURM's words, such as gpu:a100:1, instead of gpus_per_task."""
    cpus_per_task: int = 1
    """Cores of a worker."""
    memory: str = ""
    """Memory of a task on each node, such as 32GB."""
    exclusive: bool = False
    """Take whole nodes."""
    constraint: str = ""
    """Node features that are required."""
    nodelist: str = ""
    """Nodes that must be used."""
    exclude: str = ""
    """Nodes that must not be used."""
    comment: str = ""
    """A comment of the jobs."""
    requeue: bool = True
    """Let SLURM requeue a task whose node fails or is taken away."""
    mail_user: str = ""
    """Whom SLURM writes to."""
    mail_type: str = ""
    """About what: BEGIN, END, FAIL, ALL."""
    container: Literal["", "pyxis", "apptainer"] = ""
    """Run in a container: with SLURM's pyxis plug-in, or with apptainer."""
    container_image: str = ""
    """Its image."""
    container_mounts: str = ""
    """Its mounts, as the runtime writes them: /data:/data,/scratch."""
    container_python: str = "python3"
    """The Python inside the container that has clip-batch."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before a task, such as "module load cuda"."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """More sbatch options, as JSON: {"reservation": "night"}."""
    merge_time: int = 720
    """Minutes of a merge task."""
    merge_cpus: int = 8
    """Cores of a merge task."""
    merge_memory: str = "64GB"
    """Memory of a merge task; see shard_rows."""
    merge_partition: str = ""
    """SLURM partition of the merge tasks, if not slurm_partition: they need no GPU."""


@dataclass(frozen=True)
class SparkConfig:
    """How spark-submit is called; what it leaves out comes from Spark's own spark-defaults.conf."""

    master: str = ""
    """spark://host:7077, yarn, k8s://..., local-cluster[2,1,1024]; default: Spark's."""
    deploy_mode: Literal["", "client", "cluster"] = ""
    """Where the driver runs."""
    app_name: str = "clip-batch"
    """Name of the application."""
    properties_file: str = ""
    """Instead of Spark's own spark-defaults.conf; see spark/spark-defaults.conf."""
    archives: str = ""
    """An environment for the executors, made with conda-pack or venv-pack: env.tar.gz#environment."""
    spark_conf: dict[str, Any] = field(default_factory=dict)
    """More Spark properties, as JSON: {"spark.executor.instances": 64}."""
    spark_submit: str = "spark-submit"
    """The spark-submit to call."""


@dataclass(frozen=True)
class SearchConfig:
    """Search an index from the shell, in process."""

    k: int = field(default=10, metadata={"short": "-k"})
    """Hits."""
    threshold: float | None = None
    """Least score of a hit; for `filter`, every row that has it, however many."""
    modality: Literal["image", "text"] = "image"
    """Which index is searched."""
    effort: int | None = None
    """nprobe or efSearch; default: what merge tuned."""
    where: str = ""
    """Condition that the metadata of a hit must meet, such as 'license = "cc0" and width > 512'; see docs/search.md."""
    unique: bool = False
    """Leave out near duplicates: of hits that are, take only the best."""
    unique_threshold: float = 0.94
    """The cosine from which two hits are near duplicates."""
    safe: bool = False
    """Leave out hits that the safety head refuses."""
    nonviolent: bool = False
    """Leave out hits that the violence head refuses."""
    aesthetic: float | None = None
    """Weight of the aesthetic head in the order of the hits; default: none."""
    safety_head: str = ""
    """FILE or URL of weights that judge safety, with #sha256=...&activation=relu&output=sigmoid as they need."""
    violence_head: str = ""
    """FILE or URL of weights that judge violence, written as for `safety_head`."""
    aesthetic_head: str = ""
    """FILE or URL of weights that judge beauty, written as for `safety_head`."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N, for the query's encoder."""
    model: str = ""
    """The encoder's tag or checkpoint on this machine, if it is not where it was planned; its weights must match."""
    pretrained: str = ""
    """The pretrained tag, or the checkpoint file, of that encoder on this machine."""


@dataclass(frozen=True)
class ServeConfig:
    """Serve indices over HTTP, with a web page."""

    host: str = "127.0.0.1"
    """Address to listen on; loopback unless you say otherwise."""
    port: int = 1234
    """Port to listen on (clip-retrieval's default)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    model: str = ""
    """Where the encoder lies on this machine, if not where it was planned; its weights must match."""
    pretrained: str = ""
    """Likewise."""
    poll: float = 5.0
    """Seconds between looks at CURRENT; a new version is opened beside the old one, then takes its place; 0: never."""
    token: str = ""
    """What clients must send as `Authorization: Bearer TOKEN`; best given as CLIP_BATCH_TOKEN."""
    cors: list[str] = field(default_factory=list)
    """Origins whose pages may ask, such as https://example.org; * for any."""
    columns: list[str] = field(default_factory=list)
    """Metadata columns that answers carry; default: all. `image` adds the image itself to /knn-service, in base64."""
    max_k: int = 10_000
    """Hits a request may ask for."""
    prefilter_rows: int = 1_000_000
    """Rows of an index in which filters are looked up in all metadata before the search, so that rare ones are met."""
    max_scan: int = 100_000
    """Candidates that a request with filters may look through in a larger index."""
    max_queries: int = 16
    """Queries that a request may mix, or embed."""
    max_body: str = "20MB"
    """Size of a request, and of an image that is fetched."""
    max_pixels: int = 50_000_000
    """Width times height of an image that searches."""
    max_pending: int = 256
    """Requests at work or waiting; more are told to come again (503)."""
    rate: float = 0.0
    """Requests a second that each client's address may make; 0: any number."""
    rate_burst: int = 50
    """Requests that a client may make at once before `rate` holds."""
    image_url: bool = False
    """Let requests name an image by its URL, which this machine then fetches; never from private addresses."""
    image_url_private: bool = False
    """Fetch from private and loopback addresses too: whoever may ask then reaches them. For tests."""
    fetch_timeout: float = 10.0
    """Seconds for an image's fetch, redirects and all."""
    query_batch: int = 32
    """Queries that are encoded together."""
    query_wait: float = 2.0
    """Milliseconds that the first of them waits for more."""
    text_cache: str = "64MB"
    """Memory for the vectors of texts asked before."""
    serve_threads: int = 0
    """Threads that search, read metadata and images; 0: two a core."""
    aesthetic_head: str = ""
    """FILE or URL of weights that judge beauty, with #sha256=...&activation=relu&output=sigmoid as they need."""
    safety_head: str = ""
    """Likewise, for hits that are not safe to show."""
    violence_head: str = ""
    """Likewise, for hits that show violence."""


@dataclass(frozen=True)
class DatabaseConfig:
    """The databases that `export` fills and `serve` answers from, if both are named; best given in the environment."""

    milvus: str = ""
    """Where vectors are: http://[user:password@]host:port, or a path FILE.db for milvus-lite."""
    milvus_token: str = ""
    """Its token, or user:password, if it is not in the URL."""
    milvus_index: Literal["AUTOINDEX", "FLAT", "IVF_FLAT", "HNSW"] = "AUTOINDEX"
    """Kind of Milvus's own index; FLAT is exact."""
    sql: str = ""
    """Where metadata is: kind://user:password@host/database of SQLAlchemy, or the path of an SQLite file."""
    table_prefix: str = "clip_batch"
    """Tables and collections are named <table_prefix>_<version>."""


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str) -> int:
    """Parse a size such as "4GB", "512MiB" or "1000" into bytes; ConfigError on anything else."""
    import re

    from clip_batch.errors import ConfigError

    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not found or found[2] not in _UNITS:
        raise ConfigError(f"size {text!r} is not understood: write it like 4GB, 512MiB or 1000000")
    return int(float(found[1]) * _UNITS[found[2]])
