"""The manifest of an index version: what it holds, in which files, and its measured recall."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from shlex import quote
from typing import TYPE_CHECKING, Any, TypedDict

from clip_batch.errors import ConfigError, CorruptError
from clip_batch.index.paths import CURRENT, VersionPaths, is_file_name, is_version
from clip_batch.index.publications import live_version
from clip_batch.storage.store import Store
from clip_batch.types import EncoderSpec, StoredFile

if TYPE_CHECKING:
    from clip_batch.index.ann.recall import Recall

FORMAT = 2
"""Version of the manifest's format. Format 1, which lacks some fields, is read too."""


MOST_PREDICTED = 100
"""Hits up to which a search visits predicted lists."""


DRIFT = 0.02
"""How much less recall@10 the rows added to an index may have before retraining is advised."""


class DuplicateRows(TypedDict, total=False):
    """Rows that `--dedup` left out: how many, at which cosine, and the report on them, a path below INDEX.

    `live` of them repeat rows of the version that is added to, `removed` of these rows that were removed; `unknown`
    rows could not be compared with all of it. Of a random `sample` of rows `pairs` repeat another row by exact search,
    and `found` of these were left out. Older versions have `rows`, `threshold` and `file` alone.
    """

    rows: int
    threshold: float
    file: str
    live: int
    removed: int
    unknown: int
    sample: int
    pairs: int
    found: int


class Prediction(TypedDict):
    """Whether searches by queries of one kind visit lists that are predicted, and how both ways compared.

    `efforts` has the effort of predicted searches at "10" and "100" hits (see `clip_batch.index.ann.predictor.visits`),
    `rows` the mean number of rows that they score, and `distance_rows` that of searches of the nearest centroids' lists
    at the manifest's `efforts`. `file` has the predictor by its path below INDEX; it is empty where it is not used.
    """

    used: bool
    efforts: dict[str, int]
    rows: dict[str, float]
    distance_rows: dict[str, float]
    file: dict[str, StoredFile]


@dataclass(frozen=True)
class IndexShard:
    """One index shard: its rows have the ids [offset, offset + rows).

    `files` has the shard's files by their path below the version's folder. `version` is the version that
    built the shard ("": the manifest's own), `source` the position of its OUT in the manifest's `sources`.
    """

    name: str
    rows: int
    offset: int
    files: dict[str, StoredFile]
    version: str = ""
    source: int = 0


@dataclass(frozen=True)
class MergedOutput:
    """An OUT that was merged: its URL, its plan's digest, the digest of its commits, and its number of rows.

    `missing` are the partitions that it lacked. `verified` is False where no commits vouch for the rows
    (a folder that clip-retrieval wrote). `standing` of its rows were left out, as the index, or an OUT before it, had
    them. `held` has the file, by its path below INDEX, of the slices of source shards that the index has of it (see
    `clip_batch.index.held`); older versions have none.
    """

    output: str
    plan: str
    digest: str
    rows: int
    missing: tuple[int, ...] = ()
    verified: bool = True
    standing: int = 0
    held: dict[str, StoredFile] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Manifest:
    """What an index version holds, and its measured recall.

    `created` is Unix seconds. `key` (faiss's index key) and `effort` (nprobe or efSearch; None where there is nothing
    to tune) are by modality. `recall[modality][kind]` is the recall at the tuned effort of held-out queries of a kind:
    the "text" queries of the image index are the real use. `missing` are the partitions that were not committed
    (only with `allow_partial`). `rerank` is MergeConfig's. `single[modality]` has the files, by their path below INDEX,
    of the one index that replaces the shards' own. `efforts[modality][kind]` has the effort at "10" and at "100" hits,
    by kind of query, of searches that visit the lists of the nearest centroids; `effort` is the largest of them.
    `predicted[modality][kind]` is about predicted lists: where they are used, `recall` is theirs. `tried[modality]` are
    the index keys that were tried before the build, and why (see `clip_batch.index.merge.choose`). `base` is the
    version that this one was added to, `template` the version that trained; `drift[modality][kind]` is then the
    recall@10 of the new queries among the new shards alone. `replaced` has the file, by its path below INDEX, of the
    ids of rows that newer rows of the same source shards replace (`--replace`).
    """

    version: str
    created: float
    dim: int
    rows: int
    encoder: EncoderSpec
    plan: str
    key: dict[str, str]
    effort: dict[str, int | None]
    recall: dict[str, dict[str, Recall]]
    recall_target: float
    missing: tuple[int, ...]
    allow_partial: bool
    shards: tuple[IndexShard, ...]
    sources: tuple[MergedOutput, ...] = ()
    rerank: int = 0
    single: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    base: str = ""
    template: str = ""
    drift: dict[str, dict[str, float]] = field(default_factory=dict)
    duplicates: DuplicateRows = field(default_factory=lambda: DuplicateRows())
    metric: str = "ip"
    format: int = FORMAT
    efforts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    tried: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    predicted: dict[str, dict[str, Prediction]] = field(default_factory=dict)
    replaced: dict[str, StoredFile] = field(default_factory=dict)

    def effort_for(self, modality: str, k: int, kind: str | None = None) -> int | None:
        """The effort that reaches the recall at k hits for queries of a kind; None where there is nothing to tune.

        For a kind that is not known it is the largest of all kinds. From 10 to 100 hits it grows evenly by the
        logarithm; there it stays for more.
        """
        by_kind = self.efforts.get(modality)
        if not by_kind:  # nothing to tune, or an older version, whose one effort is for all
            return self.effort[modality]
        return _between([by_kind[kind]] if kind in by_kind else list(by_kind.values()), k)

    def predicted_effort(self, modality: str, k: int, kind: str | None) -> int | None:
        """The effort of a search by a query of a kind that visits predicted lists; None where none are used.

        That is for no more hits than recall was measured at.
        """
        prediction = self.predicted.get(modality, {}).get(kind or "")
        if prediction is None or not prediction["used"] or k > MOST_PREDICTED:
            return None
        return _between([prediction["efforts"]], k)

    def __repr__(self) -> str:
        keys = ", ".join(f"{modality} {index_key}" for modality, index_key in self.key.items())
        return f"<Manifest {self.version}: {self.rows:,} rows of {self.dim} in {len(self.shards)} shards, {keys}>"

    def paths(self, shard: IndexShard) -> VersionPaths:
        """The file names of the version that built a shard, relative to INDEX."""
        return VersionPaths(shard.version or self.version)

    @property
    def files(self) -> dict[str, StoredFile]:
        """Every file of the version by its path below INDEX."""
        files = self._searched
        for held in (self.replaced, *(source.held for source in self.sources)):
            files |= held
        return files

    @property
    def _searched(self) -> dict[str, StoredFile]:
        """The files that a search opens."""
        files = {name: file for joined in self.single.values() for name, file in joined.items()}
        for by_kind in self.predicted.values():
            files |= {name: file for prediction in by_kind.values() for name, file in prediction["file"].items()}
        for shard in self.shards:
            files |= {self.paths(shard).file(name): file for name, file in shard.files.items()}
        return files

    @property
    def rows_of(self) -> dict[str, int]:
        """The rows that the version has of each OUT, by its URL, however often it was added."""
        rows = {source.output: 0 for source in self.sources}
        for shard in self.shards:
            if shard.source < len(self.sources):
                rows[self.sources[shard.source].output] += shard.rows
        return rows

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file["bytes"] for file in self.files.values())

    @property
    def searched_bytes(self) -> int:
        """Bytes of the files that a search opens."""
        return sum(file["bytes"] for file in self._searched.values())

    def to_json(self) -> str:
        """JSON text; the encoder carries its fingerprint."""
        data = asdict(self)
        data["encoder"] = self.encoder.record()
        return json.dumps(data, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """The inverse of `to_json`; ValueError, KeyError or TypeError where the text is no manifest."""
        data = json.loads(text)
        if data["format"] not in (1, FORMAT):
            raise ValueError(f"format {data['format']}, this clip-batch reads {FORMAT}")
        fingerprint = data["encoder"].pop("fingerprint")
        data["encoder"] = EncoderSpec(**data["encoder"])
        if data["encoder"].fingerprint != fingerprint:
            raise ValueError("the encoder is not the one of its fingerprint")
        data["missing"] = tuple(data["missing"])
        data["sources"] = tuple(
            MergedOutput(**{**source, "missing": tuple(source["missing"])}) for source in data.get("sources", ())
        )
        data["shards"] = tuple(IndexShard(**shard) for shard in data["shards"])
        manifest = cls(**data)
        manifest._check_names()
        return manifest

    def _check_names(self) -> None:
        """ValueError where a name would lead out of its folder: all of them become parts of paths."""
        versions = (self.base, self.template, *(shard.version for shard in self.shards))
        if wrong := [name for name in (self.version, *filter(None, versions)) if not is_version(name)]:
            raise ValueError(f"{wrong[0]!r} is not the name of a version")
        names = [name for shard in self.shards for name in (shard.name, *shard.files)]
        if wrong := [name for name in (*names, *self.files, *self._report) if not is_file_name(name)]:
            raise ValueError(f"{wrong[0]!r} is not the name of a file in it")

    @property
    def _report(self) -> tuple[str, ...]:
        """The report on duplicates, by its path below INDEX."""
        return (self.duplicates["file"],) if "file" in self.duplicates else ()

    @property
    def needs(self) -> frozenset[str]:
        """The other versions that this one needs: they have its template, or some of its files."""
        names = {self.template, *(name.partition("/")[0] for name in (*self.files, *self._report))}
        return frozenset(names - {"", self.version})


def _between(efforts: Sequence[dict[str, int]], k: int) -> int:
    """The effort at k hits between the largest at "10" and the largest at "100" hits."""
    shallow, deep = (max(by_k[name] for by_k in efforts) for name in ("10", "100"))
    depth = min(max(math.log10(max(k, 1) / 10), 0.0), 1.0)
    growth: float = (max(deep, shallow) / shallow) ** depth
    return math.ceil(shallow * growth)


def load_manifest(store: Store, version: str | None = None) -> Manifest:
    """The manifest of a version, by default of the live one.

    ConfigError: there is no CURRENT, so nothing was merged here. CorruptError: the manifest is missing or not readable.
    """
    version = version or live_version(store)
    if not version:
        if store.exists(f"index/{CURRENT}"):  # the folder of run
            inner = store.display("index")
            raise ConfigError(f"no index at {store.url}, but in its folder index: give --index {quote(inner)}")
        raise ConfigError(f"no index at {store.url}: run clip-batch merge --output OUT --index {quote(store.url)}")
    name = VersionPaths(version).manifest
    try:
        manifest = Manifest.from_json(store.read(name))
        if manifest.version != version:
            raise ValueError(f"it is that of version {manifest.version}")
        return manifest
    except FileNotFoundError:
        raise CorruptError(f"{store.display(name)} is missing: the version is not finished, merge again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{store.display(name)} is not a manifest ({error}): delete it and merge again") from None
