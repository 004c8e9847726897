"""The options of storage, and of the stages from a URL list to an index."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from clip_batch.config.fields import Options, documented
from clip_batch.config.values import Count, Device, Items, Memory, Range, Seconds, Share, Size, Threads
from clip_batch.types import IMAGE_EXTENSIONS


@documented
@dataclass(frozen=True)
class StorageConfig(Options):
    """How stores are opened; every command takes these."""

    storage_options: dict[str, Any] = field(default_factory=dict)
    """Options for fsspec, as JSON. They apply to every remote URL, and are never written to the plan or to logs."""
    index_cache: Size = "100GB"
    """Disk space in $XDG_CACHE_HOME/clip_batch for copies of remote indices; unused versions are removed first."""


@documented
@dataclass(frozen=True)
class DownloadConfig(Options):
    """Download the images of a URL list with img2dataset; see docs/end2end.md."""

    urls: str = ""
    """The list: a Parquet, CSV, TSV, JSON, JSONL or text file, a folder of such files, or the output of `filter`."""
    url_column: str = "url"
    """The list's column of URLs."""
    caption_column: str = "caption"
    """The list's column of captions. If it has no column `caption`, samples have no captions."""
    list_quotes: Literal["auto", "yes", "no"] = "auto"
    """Whether quotes enclose the cells of a CSV or TSV, or are text like any other; auto: yes in CSV, no in TSV."""
    save_columns: list[str] = field(default_factory=list)
    """Other columns of the list that go into the metadata."""
    img2dataset: str = "img2dataset"
    """The img2dataset command, which is best installed in an environment of its own."""
    image_size: Annotated[int, Range(1, 65_535)] = 256
    """Pixels that images are resized to, as `resize_mode` says."""
    resize_mode: Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"] = "keep_ratio"
    """How images are resized. keep_ratio: the shorter side to `image_size`, as suits CLIP; border: a padded square."""
    shard_samples: Count = 10_000
    """URLs per tar. After a kill, each process downloads at most this many again."""
    download_processes: Threads = 0
    """Processes that download and resize, each a tar at a time; 0: one per core."""
    download_threads: Annotated[int, Range(1, 4096)] = 64
    """Simultaneous downloads of each process."""
    timeout: Seconds = 10.0
    """Seconds without a byte after which a download has failed."""
    retries: Annotated[int, Range(0, 100)] = 1
    """How often a failed download is repeated."""
    img2dataset_options: dict[str, Any] = field(default_factory=dict)
    """Further options of img2dataset, as JSON: {"min_image_size": 64, "user_agent_token": "example"}."""


@documented
@dataclass(frozen=True)
class PlanConfig(Options):
    """Freeze which input is embedded, by which encoder, in which partitions."""

    input: list[str] = field(default_factory=list)
    """Tars: paths, URLs, globs, brace patterns ({000..999}) or @FILE lists; or Parquet files, or folders of images."""
    format: Literal["auto", "tar", "parquet", "files"] = "auto"
    """Kind of input: webdataset tars, Parquet with images or captions, or folders of images; auto: it looks."""
    modalities: list[Literal["image", "text"]] = field(default_factory=lambda: ["image", "text"])
    """What is embedded: images, captions or both. With text alone, samples need no image, but a caption."""
    unreadable: Literal["fail", "record"] = "fail"
    """What a folder that may not be listed does. fail: the plan is refused; record: it is among the failures."""
    model: str = "auto"
    """Model: open_clip's name, hf:..., timm:..., onnx:..., demo, ... (docs/models.md); auto: ViT-B-32."""
    pretrained: str = ""
    """open_clip's tag of weights (see clip-batch models), or a checkpoint's path or URL; default: a tag of ours."""
    preprocess: Literal["auto", "fast", "exact", "scaled"] = "auto"
    """Image transform. exact: the model's own; fast: nearly equal; scaled: for large JPEGs; auto: fast, else exact."""
    exif_rotation: Literal["auto", "apply", "ignore"] = "auto"
    """Whether EXIF orientation turns images. auto: apply in folders of images; ignore in tars, as open_clip does."""
    try_model: bool = True
    """Embed one sample before the plan is written, on this machine's CPU, so that an unfit model is refused here."""
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Number format of weights and arithmetic. int8 is for CPUs: it applies to images, and captions stay in fp32."""
    partition_bytes: Literal["auto"] | Memory = "auto"
    """Target size of a partition's tars; larger tars are split. auto: some 64 partitions, of 256 samples to 4 GB."""
    partition_samples: Count | None = None
    """Target number of samples per partition, instead of a size."""
    partition_count: Count | None = None
    """Number of partitions, instead of a target size."""
    image_extensions: Annotated[list[str], Items(1)] = field(default_factory=lambda: list(IMAGE_EXTENSIONS))
    """Extensions of image members, in upper or lower case. If a sample has several, the first listed is used."""
    caption_extensions: list[str] = field(default_factory=lambda: ["txt"])
    """Extensions of caption members, in upper or lower case. If a sample has several, the first listed is used."""
    key_ends: Literal["first-dot", "last-dot"] = "first-dot"
    """Where keys of tar members end. first-dot: webdataset's rule; last-dot: for dotted names, such as 22.05.png."""
    caption_field: str = ""
    """JSON field or Parquet column of captions. It goes before caption files, used where it is missing or blank."""
    image_field: str = ""
    """Parquet column that has the images; by default the only one, or the first by name, such as image or jpg."""
    extend: bool = False
    """Add what is new in the input to the plan that exists, as further partitions; those of before stay as they are."""


@documented
@dataclass(frozen=True)
class EmbedConfig(Options):
    """Embed the planned partitions that are not committed yet."""

    batch_size: int = 0
    """Images per forward pass; 0: 512 on a GPU, 32 on a CPU."""
    threads: Threads = 0
    """Decoding threads of a worker at most; 0: its share of this machine's cores. It uses as many as feed the model."""
    prefetch: Size = "4GB"
    """Disk space in TMPDIR for remote tars that a worker fetches ahead; it always fetches one slice ahead."""
    device: Device = "auto"
    """Device of the encoder: cpu, cuda or cuda:N; auto: a GPU if there is one."""
    compile: bool | None = None
    """Compile the model when a worker starts: faster; docs/formats.md says what it needs. None: on a GPU, for many."""
    share: bool = True
    """After the slot's own partitions, take over those of slower workers; see docs/architecture.md."""
    max_pixels: Count = 178_956_970
    """Largest image, in pixels; larger ones are refused before decoding. The default is Pillow's own limit."""
    max_bad_share: Share = 1.0
    """Largest fraction of failed samples that a partition may have before it fails itself; 1.0: it never does."""
    broken_shard: Literal["record", "fail"] = "record"
    """What an unreadable tar does. record: it is listed among the failures; fail: its partition fails."""
    allow_empty: bool = False
    """Exit with 0 even if no sample of a partition could be embedded. Such a partition is committed in either case."""
    compression: Literal["zstd", "snappy", "none"] = "zstd"
    """Compression of the metadata Parquet files."""
    progress: bool = True
    """Show progress on standard error."""


@documented
@dataclass(frozen=True)
class MergeConfig(Options):
    """Build sharded indices, and Arrow metadata in their order."""

    modalities: Annotated[list[Literal["image", "text"]], Items(1)] = field(default_factory=lambda: ["image", "text"])
    """Indices to build; they share rows and metadata."""
    shard_rows: int = 0
    """Largest number of rows per index shard; 0: as many as max_memory allows, up to 5,000,000."""
    max_memory: Memory = "8GB"
    """Memory that a merge task may use; docs/merge.md says what it needs."""
    index_key: str = "auto"
    """faiss factory string; auto: what fits index_memory and does best on a sample; autofaiss: autofaiss's choice."""
    index_memory: Memory = "8GB"
    """Memory that the whole index may use when it is served, without re-ranking's vectors, which stay on disk."""
    rerank: Annotated[int, Range(0, 10_000)] | Literal["auto"] = "auto"
    """Keep float16 vectors on disk, and score this many times k candidates exactly; auto: as few as do; 0: none."""
    growing: bool = False
    """Rows will be added: let --index-key auto choose codes that need no codebook (RaBitQ)."""
    layout: Literal["shards", "single"] = "shards"
    """Files of an index. shards: one per shard; single: one file for all shards of an IVF index, searched from disk."""
    made_by: Annotated[list[str], Items(1, 2)] = field(default_factory=lambda: ["ViT-B-32-quickgelu", "openai"])
    """open_clip's names of model and weights, for a folder that clip-retrieval wrote, which does not record them."""
    add: bool = False
    """Add OUT to the live version, as new shards of its trained template, instead of building a new index."""
    replace: bool = False
    """Where a tar changed after its rows were merged, put its new rows in place of the old; else that is refused."""
    anew: bool = False
    """Take the place of a live version, also of one that holds more; without --output, merge all its OUTs again."""
    dedup: Share = 0.0
    """Leave out rows whose cosine with an earlier, or live, row is this or more; 1: only equal ones; 0: keep all."""
    flat_rows: int = 50_000
    """Largest number of rows for which --index-key auto means Flat, which is exact."""
    train_rows: int = 0
    """Rows to train on, drawn from all partitions; 0: 64 per list, and at least 10,000."""
    queries: Annotated[int, Range(1, 100_000)] = 250
    """Number of held-out queries of each kind (images, captions) that recall is measured with."""
    recall_target: Annotated[float, Range(0.01, 1)] = 0.95
    """recall@10 and recall@100 that the search parameters are tuned for, for images and for captions."""
    allow_partial: bool = False
    """Merge even if partitions are missing; the manifest records which."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of every random draw."""


@documented
@dataclass(frozen=True)
class SweepConfig(Options):
    """Try index keys on a sample of OUT, before a merge."""

    keys_to_try: list[str] = field(default_factory=list)
    """faiss factory strings, in which {} stands for the number of lists; default: one of each kind that may fit."""
    sample: Count = 200_000
    """Number of rows of OUT that the keys are tried on."""
