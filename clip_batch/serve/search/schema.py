"""Requests and answers of the /v1 endpoints: what /openapi.json says of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from clip_batch.search.filters import MOST, Filter, RequestModel

KINDS = ("text", "image", "image_url", "embedding", "id")
"""What a query can be."""


class QueryModel(RequestModel):
    """What to look for: exactly one of `text`, `image`, `image_url`, `embedding` and `id`."""

    text: str | None = Field(None, max_length=10_000)
    image: str | None = Field(None, description="base64 of an image file, or a data: URL")
    image_url: str | None = Field(None, max_length=2048, description="where the server fetches an image, if it may")
    embedding: list[float] | None = Field(None, max_length=MOST, description="a vector of the encoder's space")
    id: int | None = Field(None, ge=0, lt=2**63, description="a row of the index, to find others like it")

    def given(self) -> list[str]:
        """The names of the kinds that are given."""
        return [kind for kind in KINDS if getattr(self, kind) is not None]


class WeightedQuery(QueryModel):
    """One of several queries that are mixed: the weighted sum of their unit vectors searches."""

    weight: float = Field(1.0, ge=-100, le=100, description="negative: away from it")

    @model_validator(mode="after")
    def _one(self) -> WeightedQuery:
        if len(self.given()) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}")
        return self


class SearchRequest(QueryModel):
    """One query, or several in `queries`; then how to search and what to answer."""

    queries: list[WeightedQuery] | None = Field(None, min_length=1, max_length=MOST)
    index: str | None = Field(None, max_length=1000, description="an index's name; the first one where it is absent")
    modality: Literal["image", "text"] = Field("image", description="search the images, or their captions")
    k: int = Field(10, ge=1, lt=2**31)
    threshold: float | None = Field(None, description="the least score of a hit")
    effort: int | None = Field(None, ge=1, le=1_000_000, description="nprobe or efSearch; what merge tuned if absent")
    filters: list[Filter] = Field([], max_length=100, description="all of them must hold")
    columns: list[str] | None = Field(None, max_length=1000, description="metadata to answer; all if absent")
    deduplicate: bool = Field(False, description="of hits that are near duplicates, the best")
    deduplicate_threshold: float = Field(0.94, ge=0, le=1, description="the cosine from which two are duplicates")
    safety: bool = Field(False, description="without hits that the safety head refuses")
    violence: bool = Field(False, description="without hits in which the violence head sees violence")
    aesthetic: float | None = Field(None, ge=-100, le=100, description="weight of the aesthetic head in the order")

    @model_validator(mode="after")
    def _one(self) -> SearchRequest:
        if len(self.given()) + (self.queries is not None) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)} and queries")
        return self

    def terms(self) -> Iterator[tuple[str, WeightedQuery]]:
        """The queries, each with the path of its field in the request ("" for the request itself)."""
        if self.queries is not None:
            yield from ((f"queries.{number}.", query) for number, query in enumerate(self.queries))
        else:
            kind = self.given()[0]
            yield "", WeightedQuery(**{kind: getattr(self, kind)})


class HitModel(BaseModel):
    """One hit; `score` is the cosine, `image` the path of its picture on this server, null where there is none.

    `aesthetic` is what the aesthetic head says, where it was asked.
    """

    id: int
    score: float
    image: str | None
    metadata: dict[str, Any]
    aesthetic: float | None = None


class SearchResponse(BaseModel):
    """Hits, best first. `complete` is false where filters left fewer than k of all that was looked through."""

    index: str
    version: str
    hits: list[HitModel]
    scanned: int
    complete: bool


class EmbedRequest(RequestModel):
    """Texts and images (base64) to embed."""

    texts: list[str] = Field([], max_length=MOST)
    images: list[str] = Field([], max_length=MOST)
    index: str | None = Field(None, max_length=1000, description="the index whose encoder it is; default the first")

    @model_validator(mode="after")
    def _some(self) -> EmbedRequest:
        if not self.texts and not self.images:
            raise ValueError("give texts, images or both")
        if any(len(text) > 10_000 for text in self.texts):
            raise ValueError("texts may have 10,000 characters each")
        return self


class EmbedResponse(BaseModel):
    """Unit vectors, in the order of the request; `encoder` is the fingerprint of what made them."""

    encoder: str
    dim: int
    texts: list[list[float]]
    images: list[list[float]]


class IndexModel(BaseModel):
    """An index that is served, and what can be asked of it."""

    name: str
    version: str
    rows: int
    dim: int
    encoder: str
    modalities: list[str]
    text: bool = Field(description="whether its model reads texts, as far as that is known: it may be loading")
    columns: list[str]
    recall: dict[str, Any]


class IndicesResponse(BaseModel):
    """What is served, and what this server has on: deduplicate, safety, violence, aesthetic, image_url."""

    indices: list[IndexModel]
    features: dict[str, bool]
    max_k: int
    max_queries: int


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Metadata as JSON can hold it: no NaN; bytes as text."""
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return finite({str(name): item for name, item in value.items()})
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
