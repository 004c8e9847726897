"""The manifest of an index version, and CURRENT, which names the version that serves.

INDEX/CURRENT                      the live version, swapped atomically
INDEX/<version>/manifest.json      written last: a version without it does not exist for readers
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from clip_batch.errors import ConfigError, CorruptError
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec

FORMAT = 2
CURRENT = "CURRENT"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class IndexShard:
    """One index shard: its rows have the ids [offset, offset + rows).

    `files` maps a path under INDEX/<version> to {"bytes": int, "sha256": str}; `version` is the one
    that built the shard ("": the manifest's own), `source` the position of its OUT in `sources`.
    """

    name: str
    rows: int
    offset: int
    files: dict[str, dict[str, Any]]
    version: str = ""
    source: int = 0


@dataclass(frozen=True)
class MergedOutput:
    """An OUT that was merged: `digest` is of its commits, `rows` what it has, `missing` as in the manifest.

    `verified` is False where no commits vouch for it (a folder that clip-retrieval wrote).
    """

    output: str
    plan: str
    digest: str
    rows: int
    missing: tuple[int, ...] = ()
    verified: bool = True


@dataclass(frozen=True)
class Manifest:
    """What an index version holds, and how well it finds.

    `key` and `effort` are by modality (effort None: nothing to tune). `recall[modality][queries]` has
    "1", "10" and "100" (0..1, at the tuned effort) and "queries" (how many), where `queries` is the
    kind of held-out vector that searched: "text" in the image index is the real use. `missing` are
    the partitions that were not there (only with `allow_partial`). `created` is Unix seconds.
    `rerank` is MergeConfig's. `single[modality]` has the files, below INDEX, of the one index that stands for
    those shards that have none of their own. `base` is the version that this one was added to, `template` the
    one that trained; `drift[modality]` is then the recall@10 of new queries over the new shards alone.
    `duplicates` has "rows" (how many were left out), "threshold" and "file".
    """

    version: str
    created: float
    dim: int
    rows: int
    encoder: EncoderSpec
    plan: str
    key: dict[str, str]
    effort: dict[str, int | None]
    recall: dict[str, dict[str, dict[str, float]]]
    recall_target: float
    missing: tuple[int, ...]
    allow_partial: bool
    shards: tuple[IndexShard, ...]
    sources: tuple[MergedOutput, ...] = ()
    rerank: int = 0
    single: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    base: str = ""
    template: str = ""
    drift: dict[str, dict[str, float]] = field(default_factory=dict)
    duplicates: dict[str, Any] = field(default_factory=dict)
    metric: str = "ip"
    format: int = FORMAT

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Every file of the version by its path below INDEX, with its bytes and sha256."""
        found = {name: file for files in self.single.values() for name, file in files.items()}
        for shard in self.shards:
            found |= {f"{shard.version or self.version}/{name}": file for name, file in shard.files.items()}
        return found

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file["bytes"] for file in self.files.values())

    def to_json(self) -> str:
        """JSON text; the encoder carries its fingerprint."""
        data = asdict(self)
        data["encoder"]["fingerprint"] = self.encoder.fingerprint
        return json.dumps(data, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """The inverse; ValueError, KeyError or TypeError where it is not a manifest of this format."""
        data = json.loads(text)
        if data["format"] not in (1, FORMAT):  # 1 had fewer fields
            raise ValueError(f"format {data['format']}, this clip-batch reads {FORMAT}")
        fingerprint = data["encoder"].pop("fingerprint")
        data["encoder"] = EncoderSpec(**data["encoder"])
        if data["encoder"].fingerprint != fingerprint:
            raise ValueError("the encoder is not the one of its fingerprint")
        data["missing"] = tuple(data["missing"])
        data["sources"] = tuple(
            MergedOutput(**{**one, "missing": tuple(one["missing"])}) for one in data.get("sources", ())
        )
        data["shards"] = tuple(IndexShard(**shard) for shard in data["shards"])
        return cls(**data)


def current_version(store: Store) -> str | None:
    """What CURRENT names; None where there is no CURRENT."""
    try:
        return store.read(CURRENT).decode().strip()
    except FileNotFoundError:
        return None


def load_manifest(store: Store, version: str | None = None) -> Manifest:
    """The manifest of a version, by default the live one.

    ConfigError: no CURRENT, so nothing was merged here. CorruptError: the manifest is absent or not readable.
    """
    version = version or current_version(store)
    if not version:
        raise ConfigError(f"no index at {store.url}: run clip-batch merge --output OUT --index {store.url}")
    name = f"{version}/{MANIFEST}"
    try:
        return Manifest.from_json(store.read(name))
    except FileNotFoundError:
        raise CorruptError(f"{store.display(name)} is missing: the version is not finished, merge again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{store.display(name)} is not a manifest ({error}): delete it and merge again") from None


def publish_manifest(store: Store, manifest: Manifest) -> Manifest:
    """Make a version the live one: manifest.json first, then CURRENT. The manifest that stands: the first one."""
    store.create(f"{manifest.version}/{MANIFEST}", manifest.to_json().encode())
    make_current(store, manifest.version)
    return load_manifest(store, manifest.version)


def make_current(store: Store, version: str) -> None:
    """Let a finished version serve, if it does not yet."""
    if current_version(store) != version:
        store.replace(CURRENT, f"{version}\n".encode())
