"""What the service asks of an opened index version, whoever holds its vectors and rows.

`Searcher` (faiss and Arrow) is one; `clip_batch.export.databases.backend` (Milvus and SQL) another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt
import pyarrow as pa

from clip_batch.search.conditions import Condition
from clip_batch.search.rows import Ids, RowSet, Vectors

if TYPE_CHECKING:
    from clip_batch.config import StorageConfig
    from clip_batch.encoders import Encoder
    from clip_batch.index.manifest import Manifest


class Backend(Protocol):
    """Rows have the ids 0 to manifest.rows - 1; those that were removed are in no answer, and refused by id.

    Any number of threads ask at once. Arguments and errors are `Searcher`'s.
    """

    manifest: Manifest
    storage: StorageConfig
    schema: pa.Schema

    @property
    def most(self) -> int:
        """Hits that one search gives at the most."""

    @property
    def encoder(self) -> Encoder:
        """The encoder that made the index."""

    def search_ids(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        modality: str = "image",
        effort: int | None = None,
        among: RowSet | None = None,
    ) -> tuple[Vectors, Ids]:
        """Scores float32 (n, k) and ids int64 (n, k), by descending score, then ascending id; -inf and -1 beyond."""

    def where(self, condition: Condition) -> Ids:
        """Sorted ids of the rows of which a condition is true. ConfigError: the index has no such column."""

    def select(self, ids: npt.ArrayLike) -> RowSet:
        """A selection of rows for `search_ids`, without those that were removed."""

    def table(self, ids: npt.ArrayLike, columns: list[str] | None = None) -> pa.Table:
        """The metadata of rows (n,) as an Arrow table, in the order asked."""

    def metadata(self, ids: npt.ArrayLike, columns: list[str] | None = None) -> list[dict[str, Any]]:
        """The metadata of rows (n,), in the order asked."""

    def reconstruct(self, ids: npt.ArrayLike, modality: str = "image") -> Vectors:
        """The vectors float32 (n, d) of rows; zero for a row without one."""

    def close(self) -> None:
        """Let go of what is held."""


class ExhaustiveBackend(Backend, Protocol):
    """A Backend that also gives every row over a threshold."""

    def search_over(
        self, query: npt.ArrayLike, threshold: float, modality: str = "image", effort: int | None = None
    ) -> Iterator[tuple[Vectors, Ids]]:
        """Scores (n,) and ids (n,) of the rows that score `threshold` or more, by ascending id, an index at a time."""
