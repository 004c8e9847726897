"""The requests to a service, and how their responses are read: plain data and functions, without a connection."""

from __future__ import annotations

import base64
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar
from urllib.parse import quote

from clip_batch.client.hits import ServiceHits
from clip_batch.config.paths import path_text
from clip_batch.config.texts import query_text
from clip_batch.errors import ConfigError
from clip_batch.types import Hit

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]

Image = str | os.PathLike[str] | bytes
"""An image file's path, or its bytes."""

BATCH = 16
"""Texts or images per request to embed: the default of a service's `max_queries`."""


class Item(TypedDict, total=False):
    """What is searched for: exactly one of these."""

    text: str
    image: Image
    image_url: str
    embedding: npt.ArrayLike
    id: int


class WeightedItem(Item, total=False):
    """One item of a mixture; a negative weight subtracts it."""

    weight: float


class SearchArguments(Item, total=False):
    """A search: one item, or `queries` (a weighted mixture), and its options; see /openapi.json."""

    queries: Sequence[WeightedItem]
    index: str
    modality: str
    k: int
    threshold: float
    effort: int
    deduplicate: bool
    safety: bool
    violence: bool
    aesthetic: float
    filters: Sequence[Mapping[str, Any]]
    columns: Sequence[str]


T = TypeVar("T")


@dataclass(frozen=True)
class ServiceRequest(Generic[T]):
    """A request, and `read`, which turns the JSON of its response (if `raw`, the bytes) into a result."""

    method: str
    path: str
    body: Any
    read: Callable[[Any], T]
    raw: bool = False


def search(query: SearchArguments) -> ServiceRequest[ServiceHits]:
    """POST /v1/search. ConfigError: an image cannot be read, or a vector has NaN."""
    return ServiceRequest("POST", "v1/search", _plain(query), _hits)


def with_text(text: str | None, query: SearchArguments) -> SearchArguments:
    """The arguments of a search, with a text that stands alone before them. ConfigError: there are two texts."""
    if text is None:
        return query
    if "text" in query:
        raise ConfigError("a search is given two texts: give one")
    return {**query, "text": text}


def embed(kind: str, items: Any, index: str | None) -> list[ServiceRequest[Vectors]]:
    """POST /v1/embed of "texts" or "images" (`kind`), in requests of BATCH items each."""
    items = [items] if isinstance(items, (str, bytes, os.PathLike)) else list(items)
    plain = [_base64(item) if kind == "images" else query_text(item, "a text") for item in items]
    return [
        ServiceRequest(
            "POST", "v1/embed", {kind: plain[at : at + BATCH], "index": index}, lambda answer: _vectors(answer[kind])
        )
        for at in range(0, len(plain), BATCH)
    ]


def image(index: str, id: int, version: str | None = None) -> ServiceRequest[bytes]:
    """GET /v1/image/{index}/{id}, of a version."""
    of_version = f"?version={quote(version, safe='')}" if version else ""
    path = f"v1/image/{quote(index, safe='')}/{operator.index(id)}{of_version}"
    return ServiceRequest("GET", path, None, bytes, raw=True)


def metadata(index: str, ids: Sequence[int]) -> ServiceRequest[list[dict[str, Any]]]:
    """POST /metadata, whose response may be in another order."""
    numbers = [operator.index(id) for id in ids]

    def read(answer: Any) -> list[dict[str, Any]]:
        rows = {row["id"]: row["metadata"] for row in answer}
        return [rows[id] for id in numbers]

    return ServiceRequest("POST", "metadata", {"ids": numbers, "indice_name": index}, read)


READY: ServiceRequest[None] = ServiceRequest("GET", "readyz", None, lambda answer: None)
"""GET /readyz, whose response is a success once every index is open with its encoder."""

INDICES: ServiceRequest[list[dict[str, Any]]] = ServiceRequest(
    "GET", "v1/indices", None, lambda answer: list(answer["indices"])
)
"""GET /v1/indices."""


def with_common(query: str | SearchArguments, common: SearchArguments) -> SearchArguments:
    """One of many queries, completed by the arguments that are common to all."""
    return {**common, "text": query} if isinstance(query, str) else {**common, **query}


def _plain(query: Mapping[str, Any]) -> dict[str, Any]:
    """A query or term as JSON can hold it."""
    plain = {name: value for name, value in query.items() if value is not None}
    if "text" in plain:
        query_text(plain["text"], "a query's text")
    if "image" in plain:
        plain["image"] = _base64(plain["image"])
    if "id" in plain:
        plain["id"] = operator.index(plain["id"])
    if "embedding" in plain:
        plain["embedding"] = _vectors(plain["embedding"]).reshape(-1).tolist()
        if not all(map(math.isfinite, plain["embedding"])):
            raise ConfigError("the query embedding holds NaN or infinity")
    if "queries" in plain:
        plain["queries"] = [_plain(term) for term in plain["queries"]]
    return plain


def _base64(image: Image) -> str:
    if not isinstance(image, bytes):
        image = path_text(image, "a query image")
        try:
            with open(image, "rb") as file:
                image = file.read()
        except OSError as error:
            raise ConfigError(f"query image {image!r} cannot be read: {error.strerror}") from None
    return base64.b64encode(image).decode()


def stack(parts: Sequence[Vectors]) -> Vectors:
    """The vectors of several responses as one float32 (n, d)."""
    import numpy as np

    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


def _vectors(rows: Any) -> Vectors:
    import numpy as np

    return np.asarray(rows, dtype=np.float32)


def _hits(answer: Mapping[str, Any]) -> ServiceHits:
    return ServiceHits(
        map(_hit, answer["hits"]),
        str(answer.get("index", "")),
        str(answer.get("version", "")),
        int(answer.get("scanned", 0)),
        bool(answer.get("complete", True)),
        [int(hit["id"]) for hit in answer["hits"] if hit.get("image")],
    )


def _hit(hit: Mapping[str, Any]) -> Hit:
    aesthetic = hit.get("aesthetic")
    return Hit(
        int(hit["id"]), float(hit["score"]), dict(hit["metadata"]), None if aesthetic is None else float(aesthetic)
    )
