"""The nouns that travel between stages: Shard, Slice, Partition, Plan, Sample, Failure, Commit, Hit.

Plain frozen dataclasses over the standard library, so that every layer may import them; Sample is a
tuple, as one is made of each sample that is read, and is made three times as fast.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

StrPath = str | os.PathLike[str]
"""A path, or a URL as a str."""

KEY_COLUMNS = ("key", "shard", "offset", "length", "caption")
"""Metadata columns of every row, before the pinned JSON fields (see docs/formats.md)."""

EXTRA_COLUMN = "extra"
"""Metadata column (JSON text, null where empty) for side-car fields outside the pinned schema."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One input: a tar, or with `--format files` a folder of images.

    `size` is in bytes and `etag` is what the store says of the version (both None where the store
    does not tell). `samples` is a count from a side-car or a header scan, None where unknown.
    """

    url: str
    size: int | None = None
    etag: str | None = None
    samples: int | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of whole samples of one shard: the bytes [start, stop) of the tar.

    `stop` None means to the end. With `--format files`, start and stop count images in the
    folder's sorted listing instead of bytes. `samples` is None where it was not counted.
    """

    shard: Shard
    start: int = 0
    stop: int | None = None
    samples: int | None = None

    @property
    def whole(self) -> bool:
        """True where the slice is all of its shard."""
        return self.start == 0 and self.stop is None


@dataclass(frozen=True, slots=True)
class Partition:
    """The unit of work, retry and output: ordered slices."""

    id: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder, and its identity: everything that changes an embedding.

    `model` and `pretrained` say how to load it (and may be paths of one machine); `weights` is the
    sha256 of the weights file, or empty for vectors that clip-retrieval made, which tells no more
    than a name.
    """

    model: str
    pretrained: str
    weights: str
    preprocess: str = "exact"
    precision: str = "fp32"

    @property
    def fingerprint(self) -> str:
        """16 hex digits over weights (the two names where there are none), preprocessing and precision."""
        import hashlib

        what = self.weights or f"{self.model} {self.pretrained}"
        text = "\n".join((what, self.preprocess, self.precision))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def agrees(self, other: EncoderSpec) -> bool:
        """Whether vectors of the two may be compared: the same fingerprint, or name where one has no more."""
        if self.weights and other.weights:
            return self.fingerprint == other.fingerprint
        return (self.model, self.pretrained) == (other.model, other.pretrained)


def partition_name(partition: int, count: int) -> str:
    """The zero-padded number of one of `count` partitions, as file names carry it."""
    return f"{partition:0{max(4, len(str(max(count - 1, 0))))}d}"


@dataclass(frozen=True)
class Plan:
    """Frozen partitions, and all a worker needs to know besides its slot.

    `fields` is the pinned schema of JSON side-car fields: name -> one of "string", "int64",
    "double", "bool", "json" (anything else, kept as JSON text).
    """

    partitions: tuple[Partition, ...]
    encoder: EncoderSpec
    format: str = "tar"
    fields: dict[str, str] = field(default_factory=dict)
    image_extensions: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    caption_extensions: tuple[str, ...] = ("txt",)
    digest: str = ""

    def __repr__(self) -> str:
        """Short, however many partitions there are."""
        return f"<Plan {self.digest[:12]}: {len(self.partitions):,} partitions of {self.format}, {self.encoder.model}>"

    def name(self, partition: int) -> str:
        """The zero-padded partition number, as file names carry it."""
        return partition_name(partition, len(self.partitions))


class Sample(NamedTuple):
    """One sample as it was read, in the order of its first member.

    `offset` and `length` locate the image's bytes inside the tar (None where it is compressed, or
    with `--format files`). `image`, `caption` and `json` are raw bytes, or None where absent.
    """

    key: str
    shard: str
    offset: int | None
    length: int | None
    image: bytes | memoryview | None
    caption: bytes | None
    json: bytes | None


@dataclass(frozen=True)
class Failure:
    """One sample, or (key None) one stretch of a shard, that could not be embedded."""

    key: str | None
    shard: str
    offset: int | None
    reason: str
    message: str


SHARD_REASONS = frozenset({"not_a_tar", "empty_file", "empty_shard", "truncated_tar", "corrupt_header", "bad_gzip"})
"""Failure reasons that speak of a shard, not of one sample."""

SAMPLE_REASONS = frozenset(
    {"missing_image", "truncated_member", "undecodable_image", "too_many_pixels", "extreme_aspect"}
)
"""Failure reasons that speak of one sample."""


class StoredFile(TypedDict):
    """A file as a commit or a manifest records it."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """What one partition committed: `commits/<partition>.json`, the only truth readers trust.

    `files` has the files by their path below OUT; a partition of 0 rows has only
    its failures file, or none. `shards` maps a slice's shard URL to {"seen", "embedded", "failed"}.
    `failed` counts rows by reason and `warnings` counts what was mended (missing_caption, bad_json,
    bad_utf8). Times are Unix seconds, for display only.
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

    def file(self, folder: str) -> str | None:
        """The committed path in `folder` (img_emb, text_emb, metadata, ...), None where absent."""
        return next((path for path in self.files if f"/{folder}/" in f"/{path}"), None)


@dataclass(frozen=True)
class Hit:
    """One search result: `id` is the row in the index, `score` the inner product (cosine).

    `aesthetic` is what the aesthetic head says, where a search gave it a weight.
    """

    id: int
    score: float
    metadata: dict[str, Any]
    aesthetic: float | None = None


def parse_numbers(text: str) -> list[int]:
    """Parse "0,3-5" into [0, 3, 4, 5]; ValueError on anything else."""
    numbers: list[int] = []
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        numbers += range(int(first), int(last) + 1) if dash else [int(first)]
    return numbers


def format_numbers(numbers: Iterable[int]) -> str:
    """The inverse of `parse_numbers`: sorted, runs joined by a dash."""
    ordered: Sequence[int] = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in ordered:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
