"""The manifest of an index version, and CURRENT, which names the version that serves.

INDEX/CURRENT                      the live version, swapped atomically
INDEX/<version>/manifest.json      written last: a version without it does not exist for readers
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from clip_batch.errors import ConfigError, CorruptError
from clip_batch.store import Store
from clip_batch.types import EncoderSpec

FORMAT = 1
CURRENT = "CURRENT"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class IndexShard:
    """One index shard: its rows have the ids [offset, offset + rows).

    `files` maps a path under INDEX/<version> to {"bytes": int, "sha256": str}.
    """

    name: str
    rows: int
    offset: int
    files: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Manifest:
    """What an index version holds, and how well it finds.

    `key` and `effort` are by modality (effort None: nothing to tune). `recall[modality][queries]` has
    "1", "10" and "100" (0..1, at the tuned effort) and "queries" (how many), where `queries` is the
    kind of held-out vector that searched: "text" in the image index is the real use. `missing` are
    the partitions that were not there (only with `allow_partial`). `created` is Unix seconds.
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
    metric: str = "ip"
    format: int = FORMAT

    def to_json(self) -> str:
        """JSON text; the encoder carries its fingerprint."""
        data = asdict(self)
        data["encoder"]["fingerprint"] = self.encoder.fingerprint
        return json.dumps(data, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """The inverse; ValueError, KeyError or TypeError where it is not a manifest of this format."""
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, this clip-batch reads {FORMAT}")
        fingerprint = data["encoder"].pop("fingerprint")
        data["encoder"] = EncoderSpec(**data["encoder"])
        if data["encoder"].fingerprint != fingerprint:
            raise ValueError("the encoder is not the one of its fingerprint")
        data["missing"] = tuple(data["missing"])
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
