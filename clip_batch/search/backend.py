"""The interface through which the service searches an index version.

`clip_batch.search.searcher` implements it with faiss and Arrow,
`clip_batch.export.databases.backend` with Milvus and SQL.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt
import pyarrow as pa

from clip_batch.search.conditions import Condition
from clip_batch.search.evaluate import Check, unchecked
from clip_batch.search.rows import Ids, RowSet, Vectors

if TYPE_CHECKING:
    from clip_batch.config import StorageConfig
    from clip_batch.encoders import Model
    from clip_batch.index.manifest import Manifest


class Backend(Protocol):
    """An open index version, whose rows have the ids 0 to manifest.rows - 1.

    Removed rows are in no answer, and their ids are refused. Any number of threads may call the methods. Arguments and
    errors are those of `Searcher`.
    """

    manifest: Manifest
    storage: StorageConfig
    schema: pa.Schema

    @property
    def most(self) -> int:
        """Largest number of hits of one search."""

    @property
    def encoder(self) -> Model:
        """The encoder that made the index."""

    def search_ids(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        modality: str = "image",
        effort: int | None = None,
        among: RowSet | None = None,
        kind: str | None = None,
    ) -> tuple[Vectors, Ids]:
        """Return scores float32 (n, k) and ids int64 (n, k), by descending score, then ascending id.

        A k beyond the rows counts as the number of rows. If there are fewer hits, scores are padded with -inf and ids
        with -1.
        """

    def where(self, condition: Condition, check: Check = unchecked) -> RowSet:
        """Return the rows for which a condition is true, without those that were removed.

        `check` is called every now and then, and may raise. ConfigError: the index lacks a column.
        """

    def select(self, ids: npt.ArrayLike) -> RowSet:
        """Return a set of rows for `search_ids`, without those that were removed."""

    def table(self, ids: npt.ArrayLike, columns: list[str] | None = None) -> pa.Table:
        """Return the metadata of ids (n,) as an Arrow table, in their order."""

    def metadata(self, ids: npt.ArrayLike, columns: list[str] | None = None) -> list[dict[str, Any]]:
        """Return the metadata of ids (n,) as n dicts, in their order."""

    def reconstruct(self, ids: npt.ArrayLike, modality: str = "image") -> Vectors:
        """Return the vectors float32 (n, d) of ids (n,); zero for a row without a vector."""

    def shortened(self) -> str:
        """Return the path of a memory-mapped file that is shorter than when it was opened, "" if there is none."""

    def close(self) -> None:
        """Release files, connections and memory."""


class ExhaustiveBackend(Backend, Protocol):
    """A Backend that can also find every row over a threshold."""

    def search_over(
        self, query: npt.ArrayLike, threshold: float, modality: str = "image", effort: int | None = None
    ) -> Iterator[tuple[Vectors, Ids]]:
        """Yield scores (n,) and ids (n,) of rows that score `threshold` or more, by id, one index shard at a time."""
