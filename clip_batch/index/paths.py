"""The names of all files in INDEX, relative to INDEX. No other module spells one.

    CURRENT                                   the name of the live version
    publications/<number>.json                what became live, in order: see `clip_batch.index.publications`
    tombstones/<digest>.json                  a removal list
    tombstones/<digest>.<number>.json         what became of it: removed (0), undone (1), removed again (2), ...
    <version>/manifest.json                   written last: a version without it is not finished
    <version>/image/<shard>.index             faiss index of a shard; text/<shard>.index likewise
    <version>/image/<shard>.npy               with re-ranking: the shard's vectors, float16
    <version>/image/all.index, .ivfdata       with `--layout single`: one index in place of the shards'
    <version>/metadata/<shard>.arrow          metadata of a shard
    <version>/truth/<shard>.npz               the shard's recall trials
    <version>/tombstones/<digest>.npy         ids that a removal list removes from the version: a cache
    <version>/tombstones/packed.npz           those of many lists
    <version>/template/record.json            names the attempt to train that counts
    <version>/template/<attempt>/             what it left, see `TemplatePaths`; searches read predictors
    <version>/shards/<shard>.json             names the attempt to build a shard that counts
    <version>/attempts/<shard>-<attempt>/     a shard's files until they get their final names

<shard> is zero-padded (see `MergeJob.shard_name`); <attempt> is random, so that no two attempts share a file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from clip_batch.plan.paths import OF_INDEX

CURRENT = OF_INDEX

PUBLICATIONS = "publications"
"""The folder of the log of what became live."""

REMOVALS = "tombstones"
"""The folder of the removal lists, and the name of each version's cache of them."""

TRUTH = "truth"


def publication(number: int) -> str:
    """An entry of the log of publications, by its number from 1 on."""
    return f"{PUBLICATIONS}/{number:08d}.json"


def parse_publication(name: str) -> int | None:
    """The number of a base name in the folder of the log; None for any other file."""
    match = re.fullmatch(r"([0-9]{8})\.json", name)
    return int(match[1]) if match else None


def removal_list(digest: str) -> str:
    """A removal list by its 16 hex digits."""
    return f"{REMOVALS}/{digest}.json"


def parse_removal_list(name: str) -> str | None:
    """The digest of a base name in the folder of the removal lists; None for any other file."""
    match = re.fullmatch(r"([0-9a-f]{16})\.json", name)
    return match and match[1]


def removal_event(digest: str, number: int) -> str:
    """The record of the event `number`, from 0, in the history of a removal list."""
    return f"{REMOVALS}/{digest}.{number}.json"


def parse_removal_event(name: str) -> tuple[str, int] | None:
    """Digest and number of an event's base name in the folder of the removal lists; None for any other file."""
    match = re.fullmatch(r"([0-9a-f]{16})\.(\d{1,9})\.json", name)
    return match and (match[1], int(match[2]))


def is_version(name: str) -> bool:
    """Whether a name in INDEX is that of a version: 12 hex digits."""
    return bool(re.fullmatch("[0-9a-f]{12}", name))


def is_own(name: str) -> bool:
    """Whether a name in INDEX is that of a folder of its own: a version, the log, or the removal lists."""
    return name in (PUBLICATIONS, REMOVALS) or is_version(name)


def is_file_name(name: object) -> bool:
    """Whether a record may have this as the name of a file: relative to its folder, and not of one outside.

    >>> is_file_name("image/0000.index"), is_file_name("../image/0000.index"), is_file_name("/etc/passwd")
    (True, False, False)
    """
    return isinstance(name, str) and re.fullmatch(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)*", name, re.ASCII) is not None


@dataclass(frozen=True)
class _Folder:
    """A folder, relative to INDEX; with "" its files' names are relative to it, as records have them."""

    folder: str = ""

    def _in(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name


class TemplatePaths(_Folder):
    """What one attempt to train leaves."""

    @property
    def queries(self) -> str:
        """Held-out queries, and which rows of OUT they are."""
        return self._in("queries.npz")

    @property
    def centroids(self) -> str:
        """Centroids that order the rows of an index without lists."""
        return self._in("centroids.npy")

    @property
    def dropped(self) -> str:
        """The rows of OUT that are left out as duplicates, for the shards' tasks."""
        return self._in("dropped.npy")

    @property
    def duplicates(self) -> str:
        """The report on these rows, for people."""
        return self._in("duplicates.parquet")

    @property
    def standing(self) -> str:
        """The rows of OUT that are left out because the index, or an earlier OUT, has them."""
        return self._in("standing.npy")

    @property
    def replaced(self) -> str:
        """The ids of the version's rows that newer ones replace, which no search may return."""
        return self._in("replaced.npy")

    def held(self, source: int) -> str:
        """The slices of source shards that the version has of an OUT, by its position among those that are merged."""
        return self._in(f"held-{source}.parquet")

    def index(self, modality: str) -> str:
        """The trained empty index of a modality."""
        return self._in(f"{modality}.index")

    def predictor(self, modality: str, kind: str) -> str:
        """The predictor of the lists that queries of a kind visit in the index of a modality."""
        return self._in(f"{modality}.{kind}.predictor.npy")


class VersionPaths(_Folder):
    """The files of one version; `VersionPaths(version)`.

    >>> VersionPaths("3f2a9c0d1e5b").metadata("0000")
    '3f2a9c0d1e5b/metadata/0000.arrow'
    >>> VersionPaths().metadata("0000")
    'metadata/0000.arrow'
    """

    def file(self, name: str) -> str:
        """A file of a shard, given its name relative to the version, as `IndexShard.files` has it."""
        return self._in(name)

    @property
    def manifest(self) -> str:
        """The manifest; the version is finished once it exists."""
        return self._in("manifest.json")

    def index(self, modality: str, shard: str) -> str:
        """The faiss index of a shard."""
        return self._in(f"{modality}/{shard}.index")

    def vectors(self, modality: str, shard: str) -> str:
        """The vectors that re-rank a shard's candidates."""
        return self._in(f"{modality}/{shard}.npy")

    def metadata(self, shard: str) -> str:
        """The metadata of a shard."""
        return self._in(f"metadata/{shard}.arrow")

    def truth(self, shard: str) -> str:
        """The recall trials of a shard."""
        return self._in(f"{TRUTH}/{shard}.npz")

    def joined(self, modality: str) -> str:
        """The one index of all shards; its lists lie in a file beside it."""
        return self._in(f"{modality}/all.index")

    @property
    def removals(self) -> str:
        """The folder of the cached ids of removal lists."""
        return self._in(REMOVALS)

    def removed_ids(self, digest: str) -> str:
        """The ids that a removal list removes from the version."""
        return self._in(f"{REMOVALS}/{digest}.npy")

    @property
    def packed_ids(self) -> str:
        """The ids that many removal lists remove from the version."""
        return self._in(f"{REMOVALS}/packed.npz")

    @property
    def templates(self) -> str:
        """The folder of all attempts to train, and of the record of the one that counts."""
        return self._in("template")

    @property
    def template_record(self) -> str:
        """The record of the attempt to train that counts."""
        return self._in("template/record.json")

    def template(self, attempt: str) -> TemplatePaths:
        """What an attempt to train leaves."""
        return TemplatePaths(self._in(f"template/{attempt}"))

    def shard_record(self, shard: str) -> str:
        """The record of the attempt to build a shard that counts."""
        return self._in(f"shards/{shard}.json")

    @property
    def attempts(self) -> str:
        """The folder of all attempts to build a shard, or to join shards."""
        return self._in("attempts")

    def attempt(self, shard: str, attempt: str) -> str:
        """The folder of an attempt to build a shard."""
        return self._in(f"attempts/{shard}-{attempt}")
