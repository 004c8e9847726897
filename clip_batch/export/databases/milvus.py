"""Collections of vectors in Milvus: on a server, by its URL, or in a local file that milvus-lite opens in this process.

A collection has the fields `id` (the index's row), `image` and `text` (float32, inner product), and `captioned`, which
is false where the text vector is only a placeholder of zeros. Milvus has no transactions, but writing a row again
replaces it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clip_batch.errors import ConfigError, DatabaseError, one_line
from clip_batch.index.ann.order import best
from clip_batch.storage.retry import redact

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Kind = Literal["AUTOINDEX", "FLAT", "IVF_FLAT", "HNSW"]

MOST = 16_384
"""Largest number of rows in one answer, which is a limit of Milvus."""

SENT = 2**24
"""Approximate bytes of vectors in one request. Milvus accepts 64 MB."""

ABOUT = "clip_batch"
"""Name of the collection property that says, in JSON, what the collection holds."""


class Milvus:
    """A connection to Milvus, which is a context manager.

    `uri` is http(s)://[user:password@]host:port, or a path that ends in .db. ConfigError: it is neither. DatabaseError:
    the server cannot be reached, or the file does not exist and `create` is false.
    """

    def __init__(self, uri: str, token: str = "", create: bool = False) -> None:
        self._file = "" if "://" in uri else os.path.abspath(uri)
        if not uri.startswith(("http://", "https://", "tcp://")) and not (self._file and uri.endswith(".db")):
            raise ConfigError("--milvus is not understood: write http://host:port, or the path of a file FILE.db")
        self.where, self._token = redact(uri), token
        if self._file and not create and not os.path.exists(self._file):
            raise DatabaseError(f"{self} does not exist: run clip-batch export milvus first")
        for name in ("pymilvus", "milvus_lite"):  # they log the traceback of each error that they raise
            logging.getLogger(name).setLevel(logging.CRITICAL)
        from pymilvus import MilvusClient

        with self.database_errors():
            self.client: Any = MilvusClient(self._file or uri, token=token, timeout=10)

    def __str__(self) -> str:
        return self.where

    def __enter__(self) -> Milvus:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        if self._file:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self._file)

    @contextlib.contextmanager
    def database_errors(self) -> Iterator[None]:
        """Raise each error of Milvus within the block as a DatabaseError of one line, without secrets."""
        from grpc import RpcError
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except (MilvusException, RpcError) as error:
            message = one_line(getattr(error, "message", "") or error, 500)
            message = redact(message.replace(self._token, "...") if self._token else message)
            hint = ": another process has it open, or it is no milvus-lite file" if "Open local" in message else ""
            raise DatabaseError(f"{self}: {message}{hint}") from None

    def about(self, name: str) -> dict[str, str] | None:
        """Return what a collection records about itself; None if it does not exist. DatabaseError: it is not ours."""
        with self.database_errors():
            if not self.client.has_collection(name):
                return None
            text = self.client.describe_collection(name)["properties"].get(ABOUT)
        if text is None:
            raise DatabaseError(
                f"{self}: collection {name} is not one that clip-batch made: take another --table-prefix"
            )
        return dict(json.loads(text))

    def create(self, name: str, dim: int, modalities: Sequence[str], rows: int, about: Mapping[str, str]) -> None:
        """Create an empty collection, whose indices, of kind about["index"], are built while it is filled."""
        from pymilvus import DataType

        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("captioned", DataType.BOOL)
        indices = self.client.prepare_index_params()
        for modality in modalities:
            schema.add_field(modality, DataType.FLOAT_VECTOR, dim=dim)
            params = _build_params(about["index"], rows)
            indices.add_index(modality, index_type=about["index"], metric_type="IP", params=params)
        with self.database_errors():
            properties = {ABOUT: json.dumps(about)}
            self.client.create_collection(
                name, schema=schema, index_params=indices, consistency_level="Strong", properties=properties
            )

    def open(self, name: str, modalities: Sequence[str], kind: str) -> Collection:
        """Load an existing collection and return it; `kind` is that of its indices."""
        with self.database_errors():
            self.client.load_collection(name)
        return Collection(self, name, modalities, kind)


def _build_params(kind: str, rows: int) -> dict[str, int]:
    """Return the build parameters of an index of a kind for a number of rows."""
    if kind == "IVF_FLAT":
        return {"nlist": int(min(max(4 * rows**0.5, 16), 65_536))}
    return {"M": 16, "efConstruction": 200} if kind == "HNSW" else {}


class Collection:
    """The rows of one collection. All methods raise DatabaseError if Milvus fails."""

    def __init__(self, milvus: Milvus, name: str, modalities: Sequence[str], kind: str) -> None:
        self.milvus, self.name, self.modalities, self.kind = milvus, name, modalities, kind

    def __str__(self) -> str:
        return f"collection {self.name} of {self.milvus}"

    def count(self, start: int, stop: int) -> int:
        """Return the number of rows whose id is in [start, stop)."""
        return int(self._query(f"id >= {start} and id < {stop}", ["count(*)"])[0]["count(*)"])

    def ids(self, start: int, stop: int) -> Ids:
        """Return the sorted ids in [start, stop) that have a row; the range spans at most `MOST` ids."""
        rows = self._query(f"id >= {start} and id < {stop}", ["id"], MOST)
        return np.sort(np.array([row["id"] for row in rows], dtype=np.int64))

    def add(self, ids: Ids, vectors: Mapping[str, Vectors]) -> None:
        """Write the rows of ids (n,) with their vectors float32 (n, d) by modality."""
        captioned = _captioned(ids, vectors)
        step = max(1, SENT // max(1, sum(one[:1].nbytes for one in vectors.values())))
        for start in range(0, len(ids), step):
            rows = [
                {"id": int(ids[at]), "captioned": bool(captioned[at])}
                | {name: one[at] for name, one in vectors.items()}
                for at in range(start, min(start + step, len(ids)))
            ]
            with self.milvus.database_errors():
                self.milvus.client.upsert(self.name, rows)

    def finish(self) -> None:
        """Let Milvus store and index the rows that were written."""
        with self.milvus.database_errors():
            self.milvus.client.flush(self.name)

    def delete(self, ids: Ids) -> None:
        """Delete the rows of ids (n,) that exist."""
        for start in range(0, len(ids), MOST):
            with self.milvus.database_errors():
                self.milvus.client.delete(self.name, ids=ids[start : start + MOST].tolist())

    def differ(self, ids: Ids, vectors: Mapping[str, Vectors]) -> Ids:
        """Return those of ids (n,) whose rows exist with other vectors than these."""
        expected = {"captioned": _captioned(ids, vectors), **vectors}
        position = {int(id): at for at, id in enumerate(ids)}
        differing = [
            row["id"]
            for row in self._rows(ids, list(expected))
            if any(
                not np.array_equal(np.asarray(row[name], values.dtype), values[position[row["id"]]])
                for name, values in expected.items()
            )
        ]
        return np.array(differing, dtype=np.int64)

    def vectors(self, ids: Ids, modality: str) -> Vectors:
        """Return the vectors float32 (n, d) of ids (n,). DatabaseError: a row does not exist."""
        vectors = {row["id"]: row[modality] for row in self._rows(ids, [modality])}
        if missing := [id for id in ids.tolist() if id not in vectors]:
            raise DatabaseError(f"{self} has no row {missing[0]}: run clip-batch export milvus again")
        return np.array([vectors[id] for id in ids.tolist()], dtype=np.float32)

    def search(
        self, queries: Vectors, k: int, modality: str, effort: int | None = None, among: Ids | None = None
    ) -> tuple[Vectors, Ids]:
        """Return scores float32 (n, k) and ids int64 (n, k), best first, padded with -inf and -1.

        `queries` are float32 (n, d), and `k` at most MOST. `effort` is nprobe or ef, which other kinds of index ignore.
        `among` restricts the search to these ids.
        """
        filters = ["captioned == true"] if modality == "text" else []
        filters += [f"id in {among.tolist()}"] if among is not None else []
        name = {"IVF_FLAT": "nprobe", "HNSW": "ef"}.get(self.kind)
        params = {name: max(effort, k if name == "ef" else 1)} if effort and name else {}
        with self.milvus.database_errors():
            answers = self.milvus.client.search(
                self.name,
                data=list(queries),
                anns_field=modality,
                limit=k,
                filter=" and ".join(filters),
                search_params={"metric_type": "IP", "params": params},
            )
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        for row, hits in enumerate(answers):
            scores[row, : len(hits)] = [hit["distance"] for hit in hits]
            ids[row, : len(hits)] = [hit["id"] for hit in hits]
        return best(scores, ids, k)

    def _rows(self, ids: Ids, fields: list[str]) -> Iterator[dict[str, Any]]:
        step = max(1, min(MOST, SENT // 2**14))  # vectors of up to 4,096 dimensions
        for start in range(0, len(ids), step):
            with self.milvus.database_errors():
                yield from self.milvus.client.get(
                    self.name, ids=ids[start : start + step].tolist(), output_fields=["id", *fields]
                )

    def _query(self, filter: str, fields: list[str], limit: int | None = None) -> list[dict[str, Any]]:
        with self.milvus.database_errors():
            bound = {} if limit is None else {"limit": limit}
            return list(self.milvus.client.query(self.name, filter=filter, output_fields=fields, **bound))


def _captioned(ids: Ids, vectors: Mapping[str, Vectors]) -> npt.NDArray[np.bool_]:
    """Return bool (n,): which rows have a text vector, that is, one that is not all zero."""
    if "text" not in vectors:
        return np.zeros(len(ids), dtype=bool)
    captioned: npt.NDArray[np.bool_] = np.any(vectors["text"], axis=1)
    return captioned
