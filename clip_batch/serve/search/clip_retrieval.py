"""clip-retrieval's endpoints, so that its Python client and its web page work with this service unchanged.

clip-retrieval's own service answers 500 to requests that it does not expect; this one answers 4xx. The client asks for
safety, violence and aesthetic ranking by default; like the original, the service ignores those that it has no head for.
"""

from __future__ import annotations

import base64
import re
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from clip_batch.search.filters import MOST
from clip_batch.search.query import Criteria, kind_of
from clip_batch.search.rows import Vectors
from clip_batch.search.vectors import checked_vector, unit_vector
from clip_batch.serve.http.errors import Refused
from clip_batch.serve.http.openapi import REFUSALS, takes
from clip_batch.serve.http.requests import read_body
from clip_batch.serve.http.responses import json_response
from clip_batch.serve.search.find import check, ranked
from clip_batch.serve.search.images import image_path, original
from clip_batch.serve.search.live import OpenVersion
from clip_batch.serve.search.metadata import metadata, shown_columns
from clip_batch.serve.search.metrics import REQUEST
from clip_batch.serve.search.service import Service, decode_base64

_BEST, _MIDDLE = 9, 4.5
"""The best and the middle of clip-retrieval's aesthetic ratings, which start at 0."""

_NoneIfEmpty = BeforeValidator(lambda value: None if value == "" else value)
"""clip-retrieval's page sends "" for an option that is not set."""


class KnnRequest(BaseModel):
    """A search in clip-retrieval's form, by the first of text, image, image_url and embedding_input that is given."""

    model_config = ConfigDict(allow_inf_nan=False)

    text: str | None = Field(None, max_length=10_000)
    image: str | None = Field(None, description="base64 of an image file")
    image_url: str | None = Field(None, max_length=2048)
    embedding_input: list[float] | None = Field(None, fail_fast=True, max_length=MOST)
    modality: Literal["image", "text"] = "image"
    num_images: int = Field(100, ge=0, lt=2**31, description="hits that carry metadata")
    num_result_ids: int | None = Field(None, ge=1, lt=2**31, description="hits; num_images if absent")
    indice_name: str | None = Field(None, max_length=1000)
    use_mclip: bool | None = Field(False, description="ignored, as an index has one encoder")
    deduplicate: bool | None = False
    use_safety_model: bool | None = False
    use_violence_detector: bool | None = False
    aesthetic_score: Annotated[int | None, _NoneIfEmpty] = Field(None, ge=0, le=_BEST)
    aesthetic_weight: Annotated[float | None, _NoneIfEmpty] = Field(None, ge=-100, le=100)


class MetadataRequest(BaseModel):
    """The rows whose metadata to return."""

    ids: list[int] = Field(fail_fast=True, max_length=2**20)
    indice_name: str | None = Field(None, max_length=1000)


class KnnHit(BaseModel):
    """A hit. Its metadata columns are further fields of the same object."""

    model_config = ConfigDict(extra="allow")

    id: int
    similarity: float


class RowMetadata(BaseModel):
    """A row's metadata."""

    id: int
    metadata: dict[str, Any]


_KNN = {"text": "a red bicycle", "modality": "image", "num_images": 5}


def router(service: Service) -> APIRouter:
    """Return the routes over a service."""
    routes = APIRouter(responses=REFUSALS)

    @routes.get("/indices-list", response_model=list[str])
    async def names() -> Response:
        """The names of the indices."""
        return json_response(service.indices.names)

    @routes.post("/knn-service", response_model=list[KnnHit], openapi_extra=takes(KnnRequest, _KNN))
    async def knn(request: Request) -> Response:
        """The best hits; the first num_images of them have metadata."""
        with service.metrics.steps[REQUEST].time():
            body = await read_body(request, KnnRequest, service.max_body)
            k = body.num_images if body.num_result_ids is None else body.num_result_ids
            if not 1 <= k <= service.config.max_k:
                field = "num_images" if body.num_result_ids is None else "num_result_ids"
                raise Refused(422, f"{field}: from 1 to {service.config.max_k} on this server", field)
            with service.indices.use(body.indice_name, "indice_name") as (name, version):
                criteria = _criteria(service, body, k)
                check(service, version, criteria)
                vector = _beautified(service, version, body, await _vector(service, version, body))
                base = _base(request)

                def respond() -> Response:
                    # Like the original, do not search deeper than k to replace hits that are left out.
                    result = ranked(service, version, vector, criteria, scan=k)
                    hits = _rows(service, name, version, result.ids[: body.num_images].tolist(), base)
                    hits += [{} for _ in result.ids[body.num_images :]]
                    for hit, id, score in zip(hits, result.ids.tolist(), result.scores.tolist(), strict=True):
                        hit.update(id=id, similarity=score)
                    return json_response(hits)

                return await service.threads.run(respond)

    @routes.post("/metadata", response_model=list[RowMetadata], openapi_extra=takes(MetadataRequest, {"ids": [0, 1]}))
    async def rows(request: Request) -> Response:
        """The metadata of rows, in the order of the request."""
        body = await read_body(request, MetadataRequest, service.max_body)
        if len(body.ids) > service.config.max_k:
            raise Refused(422, f"ids: {service.config.max_k} at most on this server", "ids")
        with service.indices.use(body.indice_name, "indice_name") as (name, version):
            last = version.manifest.rows - 1
            if any(not 0 <= id <= last for id in body.ids):
                raise Refused(404, f"ids: the index has rows 0 to {last}", "ids")
            base = _base(request)

            def respond() -> Response:
                values = _rows(service, name, version, body.ids, base)
                return json_response([{"id": id, "metadata": row} for id, row in zip(body.ids, values, strict=True)])

            return await service.threads.run(respond)

    return routes


def _criteria(service: Service, body: KnnRequest, k: int) -> Criteria:
    heads = service.heads
    aesthetic = None
    if heads.aesthetic is not None and body.aesthetic_score is not None:
        aesthetic = (body.aesthetic_weight or 0.0) * (body.aesthetic_score - _MIDDLE) / _MIDDLE
    return Criteria(
        k=k,
        modality=body.modality,
        unique=bool(body.deduplicate),
        safe=bool(body.use_safety_model) and heads.safety is not None,
        nonviolent=bool(body.use_violence_detector) and heads.violence is not None,
        aesthetic=aesthetic,
        kind=kind_of([(bool(body.text), bool(body.image or body.image_url))]),
    )


async def _vector(service: Service, version: OpenVersion, body: KnnRequest) -> Vectors:
    if body.text:
        return await service.text(version, body.text)
    if body.image:
        return await service.image(version, decode_base64(body.image, "image"))
    if body.image_url:
        return await service.image(version, await service.download(body.image_url), "image_url")
    if body.embedding_input:
        return checked_vector(body.embedding_input, version.manifest.dim, "embedding_input")
    raise Refused(422, "give one of text, image, image_url and embedding_input", "text")


def _beautified(service: Service, version: OpenVersion, body: KnnRequest, vector: Vectors) -> Vectors:
    """Return the query moved towards the vector of a rating, if the aesthetic head consists of such vectors."""
    ratings = service.heads.ratings
    if ratings is None or body.aesthetic_score is None or ratings.shape[1] != version.manifest.dim:
        return vector
    rating = ratings[round(body.aesthetic_score * (len(ratings) - 1) / _BEST)]
    return unit_vector(vector + (body.aesthetic_weight or 0.0) * rating, "aesthetic_weight")


def _rows(service: Service, name: str, version: OpenVersion, ids: list[int], base: str) -> list[dict[str, Any]]:
    """Return metadata as clip-retrieval's page and client expect it: `url` of the image, `image` in base64."""
    rows, readable = metadata(service, version, np.asarray(ids, np.int64), shown_columns(service, version))
    embedded = "image" in service.config.columns
    for id, row, has_image in zip(ids, rows, readable, strict=True):
        if has_image and "url" not in version.columns:
            row["url"] = base + image_path(name, version, id)
        if has_image and embedded and (data := original(version, id)) is not None:
            row["image"] = base64.b64encode(data).decode()
    return rows


def _base(request: Request) -> str:
    """Return the URL at which the client reached this server, or "" if its Host header is not plainly a host."""
    host = request.headers.get("host", "")
    root = request.scope.get("root_path", "")
    return (
        f"{request.url.scheme}://{host}{root}"
        if re.fullmatch(r"[\w.\-]+(:\d+)?|\[[0-9a-fA-F:]+\](:\d+)?", host)
        else ""
    )
