"""The nouns that every folder uses: Shard, Slice, Partition, Plan, Sample, Failure, Commit, Hit.

They are frozen dataclasses that need the standard library alone. Sample is a NamedTuple, which is created three times
as fast: there is one for each sample that is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypedDict

StrPath = str | os.PathLike[str]
"""A path, or a URL as a str."""

KEY_COLUMNS = ("key", "shard", "offset", "length", "caption")
"""Metadata columns of every row, before the pinned JSON fields (see docs/formats.md)."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jfif", "jpe", "heic", "heif")
"""Extensions of images, without a dot, unless an option names others."""

CAPTION_FIELDS = ("caption", "captions", "text", "TEXT")
"""Fields of JSON side-cars, and columns of Parquet files, that are captions in the data sets of others."""

ERROR_FIELD = "error_message"
"""The field of a JSON side-car, or column of a Parquet file, in which img2dataset says why a sample has no image."""

MODALITIES = ("image", "text")
"""What may be embedded of a sample: its image, and its caption."""

ROW_GROUP, IMAGE_COLUMN = "row_group", "image_column"
"""Metadata columns of rows of Parquet files: the row group that has the row, and the column that has its image."""

EXTRA_COLUMN = "extra"
"""Metadata column (JSON text, null where empty) for side-car fields outside the pinned schema."""


UNREADABLE = "unreadable"
"""The etag of a Shard that stands for a folder which could not be listed when the plan was made."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One input: a tar, a Parquet file, or with `--format files` a folder of images.

    - `url`: its path or URL.
    - `size`: bytes; None for a folder, or where the store does not tell.
    - `etag`: its version: etag, generation or modification time; for a folder, that of its frozen listing (in plans of
      before there were listings, a digest of its files' names). None where the store does not tell; UNREADABLE for a
      folder that could not be listed.
    - `samples`: number of samples, from a side-car or a scan of the headers; None where it was not counted.
    """

    url: str
    size: int | None = None
    etag: str | None = None
    samples: int | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of whole samples of one shard.

    - `start`, `stop`: the bytes [start, stop) of a tar, or of a Parquet file, whose row groups that begin there belong
      to the slice, or, with `--format files`, the samples [start, stop) of the folder's sorted listing. `stop` None
      means to the end.
    - `samples`: number of samples in the slice; None where it was not counted.
    """

    shard: Shard
    start: int = 0
    stop: int | None = None
    samples: int | None = None

    @property
    def whole(self) -> bool:
        """Whether the slice is all of its shard."""
        return self.start == 0 and self.stop is None


@dataclass(frozen=True, slots=True)
class Partition:
    """The unit of work, retry and output.

    - `id`: its number in the plan, from 0.
    - `slices`: its input, in the order of its rows.
    """

    id: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder, and its identity: everything that changes an embedding.

    - `model`, `pretrained`: names by which it is loaded; they may be paths of one machine.
    - `weights`: sha256 (hex) of the weights and what belongs to them; "" for vectors of clip-retrieval, of which only
      the names are known.
    - `preprocess`: how images are decoded and resized.
    - `precision`: the number type that the model computes in.
    - `exif_rotation`: whether images are turned upright by their EXIF orientation first.
    """

    model: str
    pretrained: str
    weights: str
    preprocess: str = "exact"
    precision: str = "fp32"
    exif_rotation: bool = False

    @property
    def fingerprint(self) -> str:
        """16 hex digits, a digest of `weights` (of the two names if that is "") and the fields after it."""
        import hashlib

        what = self.weights or f"{self.model} {self.pretrained}"
        rotation = ("exif_rotation",) if self.exif_rotation else ()
        text = "\n".join((what, self.preprocess, self.precision, *rotation))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """What plans and manifests record: the fields and the fingerprint.

        `exif_rotation` is left out where it is False, as in records of before, which older versions read.
        """
        fields = {name: value for name, value in asdict(self).items() if name != "exif_rotation" or value}
        return {**fields, "fingerprint": self.fingerprint}

    def agrees(self, other: EncoderSpec) -> bool:
        """Whether vectors of the two may be compared: by fingerprint, or by the names if one has no weights."""
        if self.weights and other.weights:
            return self.fingerprint == other.fingerprint
        return (self.model, self.pretrained) == (other.model, other.pretrained)


def partition_name(partition: int, count: int) -> str:
    """The zero-padded number of one of `count` partitions, as in file names.

    >>> partition_name(7, 1000)
    '0007'
    """
    return f"{partition:0{max(4, len(str(max(count - 1, 0))))}d}"


class Generation(NamedTuple):
    """Partitions [start, stop) of a plan, which were planned together, and the digest of the plan up to them."""

    start: int
    stop: int
    digest: str


def generation_of(generations: Sequence[Generation], partition: int) -> Generation:
    """The generation that has a partition, of all generations of a plan."""
    return next(one for one in reversed(generations) if one.start <= partition)


@dataclass(frozen=True)
class Plan:
    """The frozen partitions, and everything else that a worker needs besides its slot.

    - `partitions`: every partition; partition i has the id i.
    - `encoder`: the encoder that embeds it.
    - `format`: "tar", "parquet", or "files" for folders.
    - `fields`: the pinned schema of JSON side-car fields: by name "string", "int64", "double", "bool", or "json"
      (any other value, kept as JSON text).
    - `image_extensions`, `caption_extensions`: without a dot; of several that a sample has, the first one here is used.
    - `digest`: sha256 (hex) of the plan's content. After an extension it is that of the last generation, which covers
      all before it.
    - `passed_over`: number of files in the input's folders that are no input, by extension; no part of the digest.
    - `key_ends`: where keys of a tar's members end, at the "first-dot" (webdataset's rule) or the "last-dot".
    - `caption_field`: the field of JSON side-cars that has the captions; "" where only caption files have them. In
      Parquet the column that has them; "" chooses one in each file by its name.
    - `image_field`: the column of a Parquet file that has the images; "" chooses one in each file.
    - `modalities`: what is embedded, of "image" and "text". Without "image", samples need no image.
    - `generations`: of a plan that was extended, the partitions of the first plan and of each extension; else ().
    - `listings`: the URL of the folder that has the frozen listings of its folders of files.
    """

    partitions: tuple[Partition, ...]
    encoder: EncoderSpec
    format: str = "tar"
    fields: dict[str, str] = field(default_factory=dict)
    image_extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    caption_extensions: tuple[str, ...] = ("txt",)
    digest: str = ""
    passed_over: dict[str, int] = field(default_factory=dict)
    caption_field: str = ""
    key_ends: str = "first-dot"
    image_field: str = ""
    modalities: tuple[str, ...] = MODALITIES
    generations: tuple[Generation, ...] = ()
    listings: str = field(default="", compare=False)

    def __repr__(self) -> str:
        """Short, however many partitions there are."""
        return f"<Plan {self.digest[:12]}: {len(self.partitions):,} partitions of {self.format}, {self.encoder.model}>"

    def name(self, partition: int) -> str:
        """The zero-padded number of a partition, as in file names. An extension changes no name."""
        return partition_name(partition, self.generation(partition).stop)

    def generation(self, partition: int) -> Generation:
        """The generation of a partition; its commit has the generation's digest."""
        return generation_of(self.generations or (Generation(0, len(self.partitions), self.digest),), partition)


class Sample(NamedTuple):
    """One sample as it was read.

    - `key`: its key as `clip_batch.storage.names.name_text` writes it, unique in well-formed shards only.
    - `shard`: the URL of its shard.
    - `offset`, `length`: the place of the image file in the tar, in bytes; None in a compressed tar or a folder. In a
      Parquet file `offset` is the number of the row, and `length` None.
    - `image`, `caption`, `json`: the files' bytes; None where absent.
    - `beside`: its caption by the plan's `caption_field` in the Parquet file beside its tar; None without one.
    """

    key: str
    shard: str
    offset: int | None
    length: int | None
    image: bytes | memoryview | None
    caption: bytes | None
    json: bytes | None
    beside: str | None = None


@dataclass(frozen=True)
class Failure:
    """One sample, or one stretch of a shard, that could not be embedded.

    - `key`: the sample's key; None for a stretch of a shard.
    - `shard`: the URL of its shard.
    - `offset`: the byte of the tar where the sample or the damage begins, or the row of a Parquet file; None where
      unknown.
    - `reason`: one of SAMPLE_REASONS or SHARD_REASONS.
    - `message`: one line that says what is wrong.
    """

    key: str | None
    shard: str
    offset: int | None
    reason: str
    message: str


class PassedOver(NamedTuple):
    """The files of one slice that are part of no row and of no failure.

    - `shard`: the URL of their shard.
    - `files`: their number by extension, in lower case (see `extension`).
    """

    shard: str
    files: dict[str, int]


Item = Sample | Failure | PassedOver
"""What reading a slice yields."""

SHARD_REASONS = frozenset(
    {
        "not_a_tar",
        "empty_file",
        "empty_shard",
        "truncated_tar",
        "corrupt_header",
        "bad_gzip",
        "bad_compression",
        "unreadable_folder",
        "not_parquet",
        "corrupt_parquet",
    }
)
"""Reasons of failures that concern a shard."""

SAMPLE_REASONS = frozenset(
    {
        "missing_image",
        "broken_link",
        "dotted_name",
        "unreadable_file",
        "unreadable_row",
        "missing_caption",
        "truncated_member",
        "undecodable_image",
        "too_many_pixels",
        "extreme_aspect",
    }
)
"""Reasons of failures that concern one sample."""


class StoredFile(TypedDict):
    """A file as a commit or a manifest records it: its size in bytes, and its sha256 (hex)."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """What one partition committed: the content of `commits/<partition>.json`. Readers trust nothing else.

    - `partition`: its number in the plan.
    - `attempt`: the random id of the attempt that committed, part of its files' names.
    - `rows`, `dim`: the shape of its vectors.
    - `encoder`: the encoder's fingerprint.
    - `plan`: the digest of the partition's generation of the plan.
    - `files`: its files by their path below OUT; a partition of 0 rows has its failures file alone, or none.
    - `shards`: by the URL of each slice's shard, the number of samples "seen", "embedded" and "failed".
    - `failed`: number of failures by reason.
    - `warnings`: number of rows by what was wrong with them: missing_caption, bad_json, bad_utf8, repeated_field,
      infinite_number, name_not_utf8.
    - `passed_over`: number of files in its slices that are part of no row and of no failure, by extension.
    - `started`, `finished`: Unix seconds, for display only.
    - `worker`: the name of the machine.
    - `empty`: why it has failures and no row, in one line; "" for all other partitions.
    - `inputs`: by URL, the size and version of those of its shards that were newer than planned when `repair` embedded
      them again; {} otherwise.
    - `replaces`: the attempt whose commit it replaced; "" for all that replaced none.
    """

    partition: int
    attempt: str
    rows: int
    dim: int
    encoder: str
    plan: str
    files: dict[str, StoredFile]
    shards: dict[str, dict[str, int]]
    failed: dict[str, int]
    warnings: dict[str, int]
    started: float
    finished: float
    worker: str
    passed_over: dict[str, int] = field(default_factory=dict)
    empty: str = ""
    inputs: dict[str, tuple[int | None, str | None]] = field(default_factory=dict)
    replaces: str = ""

    def file(self, folder: str) -> str | None:
        """The path below OUT of the file in a folder (img_emb, text_emb, metadata, ...); None if there is none."""
        return next((path for path in self.files if f"/{folder}/" in f"/{path}"), None)


@dataclass(frozen=True)
class Hit:
    """One search result.

    - `id`: its row in the index.
    - `score`: the inner product of its vector with the query's, which is their cosine.
    - `metadata`: its metadata by column.
    - `aesthetic`: the aesthetic head's rating, if the search gave it a weight; else None.
    """

    id: int
    score: float
    metadata: dict[str, Any]
    aesthetic: float | None = None

    def image(self) -> bytes:
        """The image file, of the version of the index that was searched; by a second request where `Client` searched.

        LookupError: it cannot be read, or the hit does not come from a search or has been pickled. From a
        Client, errors as of `Client.image`.
        """
        read: Callable[[Hit], bytes | None] | None = self.__dict__.get("_read")
        if read is None:
            raise LookupError(f"row {self.id} is not bound to a search: take Client.image or Searcher.image")
        if (data := read(self)) is None:
            raise LookupError(f"row {self.id} has no image that can be read")
        return data

    def bound(self, read: Callable[[Hit], bytes | None]) -> Hit:
        """The same hit, whose `image` calls `read`; it is no field, so that hits compare and copy without it."""
        self.__dict__["_read"] = read
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_read"}


def parse_numbers(text: str) -> list[int]:
    """Parse comma-separated numbers and ranges; ValueError on anything else.

    >>> parse_numbers("0,3-5")
    [0, 3, 4, 5]
    """
    numbers: list[int] = []
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        numbers += range(int(first), int(last) + 1) if dash else [int(first)]
    return numbers


def format_numbers(numbers: Iterable[int]) -> str:
    """Format numbers for `parse_numbers`: sorted, with runs as ranges.

    >>> format_numbers([5, 0, 3, 4])
    '0,3-5'
    """
    ordered: Sequence[int] = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in ordered:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def extension(name: str) -> str:
    """What counts of files that are passed over call a file: its extension in lower case, "no extension", or "hidden".

    >>> extension("a/b.c/scan.TIF"), extension("a/README"), extension(".DS_Store")
    ('tif', 'no extension', 'hidden')
    """
    base = name.rpartition("/")[2]
    if base.startswith("."):
        return "hidden"
    return base.rpartition(".")[2].lower() if "." in base else "no extension"


def format_counts(counts: Mapping[str, int]) -> str:
    """Counts as text, the largest first.

    >>> format_counts({"gif": 1, "bmp": 1200})
    '1,200 bmp, 1 gif'
    """
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {name}" for name, count in ordered)


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 input", "2,000 inputs"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def format_bytes(size: int) -> str:
    """A size for people, in the units that `--max-memory` takes.

    >>> format_bytes(999), format_bytes(1_540_000)
    ('999 bytes', '1.5 MB')
    """
    for exponent, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**exponent:
            return f"{size / 10**exponent:,.1f} {unit}"
    return counted(size, "byte")
