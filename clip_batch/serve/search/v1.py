"""The /v1 endpoints: search, embed, the original images, and the list of indices."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from clip_batch.search.evaluate import Check, unchecked
from clip_batch.search.find import beautified
from clip_batch.search.query import Criteria, kind_of
from clip_batch.serve.http.errors import Refused
from clip_batch.serve.http.openapi import REFUSALS, takes
from clip_batch.serve.http.ranges import answer, unchanged
from clip_batch.serve.http.requests import read_body
from clip_batch.serve.http.responses import json_response
from clip_batch.serve.search.deadline import Deadline
from clip_batch.serve.search.facts import Facts
from clip_batch.serve.search.find import check, ranked
from clip_batch.serve.search.images import image_path, media_type
from clip_batch.serve.search.live import OpenVersion
from clip_batch.serve.search.metadata import metadata, shown_columns
from clip_batch.serve.search.metrics import REQUEST
from clip_batch.serve.search.parquet import parquet, wants_parquet
from clip_batch.serve.search.schema import (
    EmbedRequest,
    EmbedResponse,
    FactsResponse,
    IndicesResponse,
    SearchRequest,
    SearchResponse,
)
from clip_batch.serve.search.service import Service, decode_base64
from clip_batch.serve.search.thumbnails import SHOWN, rounded


def router(service: Service) -> APIRouter:
    """Return the routes over a service."""
    routes = APIRouter(prefix="/v1", responses=REFUSALS)

    @routes.post(
        "/search", response_model=SearchResponse, openapi_extra=takes(SearchRequest, {"text": "a red bicycle", "k": 5})
    )
    async def search(request: Request) -> Response:
        """The best hits for a query or a mixture of queries."""
        with service.metrics.steps[REQUEST].time():
            body = await read_body(request, SearchRequest, service.max_body)
            _check_limit("k", body.k, service.config.max_k)
            _check_limit("queries", len(body.queries or []), service.config.max_queries)
            with service.indices.use(body.index) as (name, version):
                columns = _columns(service, version, body.columns)
                _check_filters(version, body)
                criteria = _criteria(body)
                check(service, version, criteria)
                vector = beautified(await service.mixed(version, list(body.terms())), criteria, service.heads)

                def respond(check: Check = unchecked) -> Response:
                    result = ranked(service, version, vector, criteria, service.config.max_scan, check)
                    rows, readable = metadata(service, version, result.ids, columns)
                    hits = []
                    for place, (id, score) in enumerate(zip(result.ids.tolist(), result.scores.tolist(), strict=True)):
                        hit = {"id": id, "score": score, "image": None, "metadata": rows[place]}
                        if readable[place]:
                            hit["image"] = image_path(name, version, id)
                        if result.aesthetic is not None:
                            hit["aesthetic"] = float(result.aesthetic[place])
                        hits.append(hit)
                    if wants_parquet(request):
                        return parquet(hits)
                    rest = {"hits": hits, "scanned": result.scanned, "complete": result.complete}
                    return json_response({"index": name, "version": version.manifest.version, **rest})

                if not body.filters:
                    return await service.threads.run(respond)
                deadline = Deadline(service.config.filter_timeout, "evaluating these filters", "filters")
                async with deadline.watching(request):
                    return await service.filters.run(respond, deadline.check)

    @routes.post(
        "/embed", response_model=EmbedResponse, openapi_extra=takes(EmbedRequest, {"texts": ["a red bicycle"]})
    )
    async def embed(request: Request) -> Response:
        """The unit vectors of texts and images."""
        body = await read_body(request, EmbedRequest, service.max_body)
        _check_limit("texts", len(body.texts), service.config.max_queries)
        _check_limit("images", len(body.images), service.config.max_queries)
        images = [(f"images.{i}", decode_base64(image, f"images.{i}")) for i, image in enumerate(body.images)]
        with service.indices.use(body.index) as (_, version):
            pending = [service.text(version, text) for text in body.texts]
            pending += [service.image(version, data, field) for field, data in images]
            vectors = [vector.tolist() for vector in await asyncio.gather(*pending)]
            fingerprint, dim = version.manifest.encoder.fingerprint, version.manifest.dim
        cut = len(body.texts)
        return json_response({"encoder": fingerprint, "dim": dim, "texts": vectors[:cut], "images": vectors[cut:]})

    @routes.get("/indices", response_model=IndicesResponse)
    async def indices() -> Response:
        """The served indices, and the features and limits of this server."""
        served = []
        for name in service.indices.names:
            if name in service.indices.closed():
                continue
            with service.indices.use(name) as (_, version):
                manifest = version.manifest
                served.append(
                    {
                        "name": name,
                        "version": manifest.version,
                        "rows": manifest.rows,
                        "dim": manifest.dim,
                        "encoder": manifest.encoder.fingerprint,
                        "modalities": version.modalities,
                        "columns": version.columns,
                        "recall": manifest.recall,
                        "text": service.indices.reads_text(version),
                    }
                )
        heads, config = service.heads, service.config
        features = {
            "deduplicate": True,
            "safety": heads.safety is not None,
            "violence": heads.violence is not None,
            "aesthetic": heads.beauty,
            "image_url": config.image_url,
        }
        limits = {"max_k": config.max_k, "max_queries": config.max_queries}
        return json_response({"indices": served, "features": features, **limits, "page_images": config.page_images})

    @routes.head("/image/{index}/{row}", include_in_schema=False)
    @routes.get("/image/{index}/{row}", response_class=Response, responses=_IMAGE)
    async def image(
        index: str,
        row: int,
        request: Request,
        version: str | None = None,
        width: Annotated[int | None, Query(ge=1, le=100_000)] = None,
    ) -> Response:
        """The original image of a row or, with `width`, a copy of about that width, upright.

        With `version`, as in a hit's path, rows of another version are refused.
        """
        with service.indices.use(index) as (_, opened):
            live, rows = opened.manifest.version, opened.manifest.rows
            if version is not None and version != live:
                raise Refused(404, f"index {index} has version {live} now: search again", "version")
            if not 0 <= row < rows:
                raise Refused(404, f"index {index} has rows 0 to {rows - 1}", "row")
            tag = f'"{live}-{row}"' if width is None else f'"{live}-{row}-{rounded(width)}"'
            lifetime = "max-age=86400, immutable" if version else "no-cache"
            headers = {"etag": tag, "cache-control": f"private, {lifetime}", "x-content-type-options": "nosniff"}
            headers["content-security-policy"] = "default-src 'none'; sandbox"
            if unchanged(request, tag):
                return Response(status_code=304, headers=headers)
            data = await service.images.read(opened, row, width)
        return answer(request, data, media_type(data), headers)

    facts = Facts(service)

    @routes.get("/facts/{index}", response_model=FactsResponse)
    async def about(index: str) -> Response:
        """What is in an index: its columns with their values, a sample of its rows, and examples of queries."""
        return json_response(await facts.of(index))

    return routes


_IMAGE: dict[int | str, dict[str, Any]] = {
    200: {"content": {f"image/{kind}": {} for kind in SHOWN} | {"application/octet-stream": {}}},
    206: {"description": "The range of the image that the header Range names."},
    304: {"description": "The image has not changed."},
    416: {"description": "The range begins behind the end of the image."},
}


def _check_limit(field: str, value: int, limit: int) -> None:
    """Raise Refused (422) if a value of the request is over the server's limit."""
    if value > limit:
        raise Refused(422, f"{field}: {limit} at most on this server", field)


def _columns(service: Service, version: OpenVersion, names: list[str] | None) -> list[str]:
    """Return the columns to respond with: those that the request names, by default all that the options allow.

    Raises Refused (400) if the request names another one.
    """
    allowed = shown_columns(service, version)
    for number, name in enumerate(names or []):
        if name not in allowed:
            raise Refused(
                400, f"columns.{number}: no column {name!r}; there are {', '.join(allowed)}", f"columns.{number}"
            )
    return allowed if names is None else list(dict.fromkeys(names))


def _check_filters(version: OpenVersion, body: SearchRequest) -> None:
    """Raise Refused (400) if a filter is on a column that the index does not have."""
    for number, condition in enumerate(body.filters):
        if condition.column not in version.columns:
            field = f"filters.{number}.column"
            raise Refused(400, f"{field}: no column {condition.column!r}; {', '.join(version.columns)}", field)


def _criteria(body: SearchRequest) -> Criteria:
    return Criteria(
        k=body.k,
        threshold=body.threshold,
        modality=body.modality,
        effort=body.effort,
        where=body.filters,
        unique=body.deduplicate,
        unique_threshold=body.deduplicate_threshold,
        safe=body.safety,
        nonviolent=body.violence,
        aesthetic=body.aesthetic,
        kind=kind_of((term.text is not None, term.image is not None) for _, term in body.terms()),
    )
