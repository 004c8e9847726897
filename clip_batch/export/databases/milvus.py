"""One Milvus collection of vectors: a server's by its URL, or milvus-lite's in a local file, in this process.

Fields: `id` (the index's row), `image` and `text` (float32, inner product), `captioned` (whether the text is a vector).
Milvus has no transactions; a row is written again under its id without harm.
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
"""Rows of one answer at the most, by Milvus's own limit."""

SENT = 2**24
"""Bytes of vectors in one request, about; Milvus takes 64 MB."""

ABOUT = "clip_batch"
"""The collection's property that says, in JSON, what it holds."""


class Milvus:
    """A connection; a context manager. `uri` is http(s)://[user:password@]host:port, or a path that ends in .db.

    ConfigError: it is neither. DatabaseError: it cannot be reached or, with `create` off, there is no such file.
    """

    def __init__(self, uri: str, token: str = "", create: bool = False) -> None:
        self._file = "" if "://" in uri else os.path.abspath(uri)
        if not uri.startswith(("http://", "https://", "tcp://")) and not (self._file and uri.endswith(".db")):
            raise ConfigError("--milvus is not understood: write http://host:port, or the path of a file FILE.db")
        self.where, self._token = redact(uri), token
        if self._file and not create and not os.path.exists(self._file):
            raise DatabaseError(f"{self} is not there: run clip-batch export milvus first")
        for name in ("pymilvus", "milvus_lite"):  # they log tracebacks of what they raise
            logging.getLogger(name).setLevel(logging.CRITICAL)
        from pymilvus import MilvusClient

        with self.asked():
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
    def asked(self) -> Iterator[None]:
        """What Milvus refuses within the block is a DatabaseError of one line."""
        from grpc import RpcError
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except (MilvusException, RpcError) as error:
            said = one_line(getattr(error, "message", "") or error, 500)
            said = redact(said.replace(self._token, "...") if self._token else said)
            hint = ": another process has it open, or it is no milvus-lite file" if "Open local" in said else ""
            raise DatabaseError(f"{self}: {said}{hint}") from None

    def about(self, name: str) -> dict[str, str] | None:
        """What a collection says it holds; None where there is none. DatabaseError: it is not one of ours."""
        with self.asked():
            if not self.client.has_collection(name):
                return None
            text = self.client.describe_collection(name)["properties"].get(ABOUT)
        if text is None:
            raise DatabaseError(
                f"{self}: collection {name} is not one that clip-batch made: take another --table-prefix"
            )
        return dict(json.loads(text))

    def create(self, name: str, dim: int, modalities: Sequence[str], rows: int, about: Mapping[str, str]) -> None:
        """Create a collection without rows, its indices (of kind about["index"]) built as it is filled."""
        from pymilvus import DataType

        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("captioned", DataType.BOOL)
        indices = self.client.prepare_index_params()
        for modality in modalities:
            schema.add_field(modality, DataType.FLOAT_VECTOR, dim=dim)
            built = _built(about["index"], rows)
            indices.add_index(modality, index_type=about["index"], metric_type="IP", params=built)
        with self.asked():
            properties = {ABOUT: json.dumps(about)}
            self.client.create_collection(
                name, schema=schema, index_params=indices, consistency_level="Strong", properties=properties
            )

    def open(self, name: str, modalities: Sequence[str], kind: str) -> Collection:
        """A collection that is there, loaded; `kind` is that of its indices."""
        with self.asked():
            self.client.load_collection(name)
        return Collection(self, name, modalities, kind)


def _built(kind: str, rows: int) -> dict[str, int]:
    """How an index of a kind is built for so many rows."""
    if kind == "IVF_FLAT":
        return {"nlist": int(min(max(4 * rows**0.5, 16), 65_536))}
    return {"M": 16, "efConstruction": 200} if kind == "HNSW" else {}


class Collection:
    """The rows of one collection. DatabaseError: as `Milvus`."""

    def __init__(self, milvus: Milvus, name: str, modalities: Sequence[str], kind: str) -> None:
        self.milvus, self.name, self.modalities, self.kind = milvus, name, modalities, kind

    def __str__(self) -> str:
        return f"collection {self.name} of {self.milvus}"

    def count(self, start: int, stop: int) -> int:
        """How many rows have an id in [start, stop)."""
        return int(self._query(f"id >= {start} and id < {stop}", ["count(*)"])[0]["count(*)"])

    def ids(self, start: int, stop: int) -> Ids:
        """Those ids, sorted; [start, stop) spans `MOST` at the most."""
        rows = self._query(f"id >= {start} and id < {stop}", ["id"], MOST)
        return np.sort(np.array([row["id"] for row in rows], dtype=np.int64))

    def add(self, ids: Ids, vectors: Mapping[str, Vectors]) -> None:
        """Write rows (n,) with their vectors (n, d) by modality."""
        captioned = _captioned(ids, vectors)
        step = max(1, SENT // max(1, sum(one[:1].nbytes for one in vectors.values())))
        for start in range(0, len(ids), step):
            rows = [
                {"id": int(ids[at]), "captioned": bool(captioned[at])}
                | {name: one[at] for name, one in vectors.items()}
                for at in range(start, min(start + step, len(ids)))
            ]
            with self.milvus.asked():
                self.milvus.client.upsert(self.name, rows)

    def finish(self) -> None:
        """Let what was written be stored and indexed."""
        with self.milvus.asked():
            self.milvus.client.flush(self.name)

    def delete(self, ids: Ids) -> None:
        """Delete the rows (n,) that are there."""
        for start in range(0, len(ids), MOST):
            with self.milvus.asked():
                self.milvus.client.delete(self.name, ids=ids[start : start + MOST].tolist())

    def differ(self, ids: Ids, vectors: Mapping[str, Vectors]) -> Ids:
        """Which of the rows (n,) are there with other vectors than these."""
        wanted = {"captioned": _captioned(ids, vectors), **vectors}
        place = {int(id): at for at, id in enumerate(ids)}
        found = [
            row["id"]
            for row in self._rows(ids, list(wanted))
            if any(
                not np.array_equal(np.asarray(row[name], one.dtype), one[place[row["id"]]])
                for name, one in wanted.items()
            )
        ]
        return np.array(found, dtype=np.int64)

    def vectors(self, ids: Ids, modality: str) -> Vectors:
        """The vectors float32 (n, d) of rows. DatabaseError: one is not there."""
        found = {row["id"]: row[modality] for row in self._rows(ids, [modality])}
        if missing := [id for id in ids.tolist() if id not in found]:
            raise DatabaseError(f"{self} has no row {missing[0]}: run clip-batch export milvus again")
        return np.array([found[id] for id in ids.tolist()], dtype=np.float32)

    def search(
        self, queries: Vectors, k: int, modality: str, effort: int | None = None, among: Ids | None = None
    ) -> tuple[Vectors, Ids]:
        """Scores float32 (n, k) and ids int64 (n, k), best first; -inf and -1 beyond. k is `MOST` at the most."""
        meets = ["captioned == true"] if modality == "text" else []
        meets += [f"id in {among.tolist()}"] if among is not None else []
        name = {"IVF_FLAT": "nprobe", "HNSW": "ef"}.get(self.kind)
        tuned = {name: max(effort, k if name == "ef" else 1)} if effort and name else {}
        with self.milvus.asked():
            found = self.milvus.client.search(
                self.name,
                data=list(queries),
                anns_field=modality,
                limit=k,
                filter=" and ".join(meets),
                search_params={"metric_type": "IP", "params": tuned},
            )
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        for line, hits in enumerate(found):
            scores[line, : len(hits)] = [hit["distance"] for hit in hits]
            ids[line, : len(hits)] = [hit["id"] for hit in hits]
        return best(scores, ids, k)

    def _rows(self, ids: Ids, fields: list[str]) -> Iterator[dict[str, Any]]:
        step = max(1, min(MOST, SENT // 2**14))  # vectors of up to 4,096 dimensions
        for start in range(0, len(ids), step):
            with self.milvus.asked():
                yield from self.milvus.client.get(
                    self.name, ids=ids[start : start + step].tolist(), output_fields=["id", *fields]
                )

    def _query(self, filter: str, fields: list[str], limit: int | None = None) -> list[dict[str, Any]]:
        with self.milvus.asked():
            bound = {} if limit is None else {"limit": limit}
            return list(self.milvus.client.query(self.name, filter=filter, output_fields=fields, **bound))


def _captioned(ids: Ids, vectors: Mapping[str, Vectors]) -> npt.NDArray[np.bool_]:
    """Which rows have a text vector."""
    if "text" not in vectors:
        return np.zeros(len(ids), dtype=bool)
    there: npt.NDArray[np.bool_] = np.any(vectors["text"], axis=1)
    return there
