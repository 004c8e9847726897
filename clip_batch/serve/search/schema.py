"""The requests and responses of the /v1 endpoints, as /openapi.json describes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from clip_batch.search.filters import MOST, MOST_VALUES, Filter, RequestModel

KINDS = ("text", "image", "image_url", "embedding", "id")
"""The kinds of queries."""


class QueryModel(RequestModel):
    """The query: exactly one of `text`, `image`, `image_url`, `embedding` and `id`."""

    text: str | None = Field(None, min_length=1, max_length=10_000)
    image: str | None = Field(None, min_length=1, description="base64 of an image file, or a data: URL")
    image_url: str | None = Field(
        None, min_length=1, max_length=2048, description="the URL of an image, if this server may download images"
    )
    embedding: list[float] | None = Field(None, fail_fast=True, max_length=MOST, description="a vector of the encoder")
    id: int | None = Field(None, ge=0, lt=2**63, description="a row of the index, to find similar ones")

    def kinds(self) -> list[str]:
        """Return the kinds of queries that the request has."""
        return [kind for kind in KINDS if getattr(self, kind) is not None]


class WeightedQuery(QueryModel):
    """One of several queries that are mixed: the search is by the weighted sum of their unit vectors."""

    weight: float = Field(1.0, ge=-100, le=100, description="a negative weight searches away from the query")

    @model_validator(mode="after")
    def _one(self) -> WeightedQuery:
        if len(self.kinds()) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}")
        return self


class SearchRequest(QueryModel):
    """One query, or several in `queries`, and the options of the search and of the response."""

    queries: list[WeightedQuery] | None = Field(None, fail_fast=True, min_length=1, max_length=MOST)
    index: str | None = Field(None, max_length=1000, description="the name of an index; by default the first one")
    modality: Literal["image", "text"] = Field("image", description="search the images or their captions")
    k: int = Field(10, ge=1, lt=2**31)
    threshold: float | None = Field(None, description="the lowest score of a hit")
    effort: int | None = Field(None, ge=1, le=1_000_000, description="nprobe or efSearch; by default as merge tuned it")
    filters: list[Filter] = Field([], fail_fast=True, max_length=100, description="a hit must meet all of them")
    columns: list[str] | None = Field(
        None, fail_fast=True, max_length=1000, description="the metadata columns in the response; by default all"
    )
    deduplicate: bool = Field(False, description="keep only the best of near duplicates")
    deduplicate_threshold: float = Field(0.94, ge=0, le=1, description="the cosine from which two hits are duplicates")
    safety: bool = Field(False, description="leave out hits that the safety head refuses")
    violence: bool = Field(False, description="leave out hits that the violence head refuses")
    aesthetic: float | None = Field(
        None, ge=-100, le=100, description="the weight of the aesthetic head in the order of hits"
    )

    @model_validator(mode="after")
    def _one(self) -> SearchRequest:
        if len(self.kinds()) + (self.queries is not None) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)} and queries")
        if sum(len(each.among or ()) for each in self.filters) > MOST_VALUES:
            raise ValueError(f"filters have {MOST_VALUES} values of in at most, all together")
        return self

    def terms(self) -> Iterator[tuple[str, WeightedQuery]]:
        """Yield the queries, each with the prefix of its fields in the request ("" for the request itself)."""
        if self.queries is not None:
            yield from ((f"queries.{number}.", query) for number, query in enumerate(self.queries))
        else:
            kind = self.kinds()[0]
            yield "", WeightedQuery(**{kind: getattr(self, kind)})


class HitModel(BaseModel):
    """One hit: its row, its cosine, and the path of its image on this server, which is null if there is none.

    `aesthetic` is the value of the aesthetic head, if the request gives it a weight.
    """

    id: int
    score: float
    image: str | None
    metadata: dict[str, Any]
    aesthetic: float | None = None


class SearchResponse(BaseModel):
    """Hits, best first. `scanned` rows were examined; `complete` is false if that limit left fewer than k hits."""

    index: str
    version: str
    hits: list[HitModel]
    scanned: int
    complete: bool


class EmbedRequest(RequestModel):
    """Texts and images (base64) to embed."""

    texts: list[str] = Field([], fail_fast=True, max_length=MOST)
    images: list[str] = Field([], fail_fast=True, max_length=MOST)
    index: str | None = Field(
        None, max_length=1000, description="the index whose encoder to use; by default the first one"
    )

    @model_validator(mode="after")
    def _some(self) -> EmbedRequest:
        if not self.texts and not self.images:
            raise ValueError("give texts, images or both")
        if any(len(text) > 10_000 for text in self.texts):
            raise ValueError("texts may have 10,000 characters each")
        return self


class EmbedResponse(BaseModel):
    """Unit vectors, in the order of the request, and the fingerprint of their encoder."""

    encoder: str
    dim: int
    texts: list[list[float]]
    images: list[list[float]]


class IndexModel(BaseModel):
    """A served index."""

    name: str
    version: str
    rows: int
    dim: int
    encoder: str
    modalities: list[str]
    text: bool = Field(description="whether its model has a text side; true as long as the model is not loaded")
    columns: list[str]
    recall: dict[str, Any]


class IndicesResponse(BaseModel):
    """The served indices, and which of deduplicate, safety, violence, aesthetic and image_url this server has on."""

    indices: list[IndexModel]
    features: dict[str, bool]
    max_k: int
    max_queries: int
    page_images: Literal["off", "direct", "proxy"] = Field(description="how the page shows images that only have a URL")


class ValueCount(BaseModel):
    """A value of a column, and how many of the rows looked at have it."""

    value: bool | int | float | str
    count: int


class ColumnFacts(BaseModel):
    """What is in a column, which filters can name.

    `kind` says which filters fit: `number` a range (`min` to `max`, with a histogram of equal steps between them),
    `date` a range of texts that begin with YYYY-MM-DD, `text` and `boolean` equality, `text` also part of it. `values`
    has all values of a column that has few, the most frequent first.
    """

    name: str
    kind: Literal["number", "date", "text", "boolean"]
    nulls: int
    min: int | float | str | None = None
    max: int | float | str | None = None
    histogram: list[int] = []
    values: list[ValueCount] = []


class SampleModel(BaseModel):
    """A row of the index, without a score."""

    id: int
    image: str | None
    metadata: dict[str, Any]


class FactsResponse(BaseModel):
    """What is in an index, from `looked_at` of its rows: all of a small index, an even sample of a large one."""

    index: str
    version: str
    created: float
    rows: int
    model: str
    looked_at: int
    columns: list[ColumnFacts]
    sample: list[SampleModel]
    examples: list[str] = Field(description="captions that serve as examples of queries")
