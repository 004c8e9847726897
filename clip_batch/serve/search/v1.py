"""The /v1 endpoints: search, embed, the original images, and what is served."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from clip_batch.search.find import beautified
from clip_batch.search.query import Criteria
from clip_batch.serve.http.errors import Refused
from clip_batch.serve.http.openapi import REFUSALS, takes
from clip_batch.serve.http.requests import read
from clip_batch.serve.http.responses import answer
from clip_batch.serve.search.find import check, metadata, ranked
from clip_batch.serve.search.images import media_type, original
from clip_batch.serve.search.live import OpenVersion
from clip_batch.serve.search.metrics import REQUEST
from clip_batch.serve.search.parquet import parquet, wants_parquet
from clip_batch.serve.search.schema import (
    EmbedRequest,
    EmbedResponse,
    IndicesResponse,
    SearchRequest,
    SearchResponse,
)
from clip_batch.serve.search.service import Service, decode_base64


def image_path(index: str, version: OpenVersion, row: int) -> str:
    """Where a row's picture is on this server. The version is in it, as its rows have other numbers in the next."""
    return f"/v1/image/{quote(index, safe='')}/{row}?version={version.manifest.version}"


def router(service: Service) -> APIRouter:
    """The routes over a service."""
    routes = APIRouter(prefix="/v1", responses=REFUSALS)

    @routes.post("/search", response_model=SearchResponse, openapi_extra=takes(SearchRequest))
    async def search(request: Request) -> Response:
        """The best hits for a query or a mixture of queries."""
        with service.metrics.steps[REQUEST].time():
            asked = await read(request, SearchRequest, service.max_body)
            _bound("k", asked.k, service.config.max_k)
            _bound("queries", len(asked.queries or []), service.config.max_queries)
            with service.indices.use(asked.index) as (name, version):
                columns = _columns(service, version, asked.columns)
                _check_filters(version, asked)
                criteria = _criteria(asked)
                check(service, version, criteria)
                vector = beautified(await service.mixed(version, list(asked.terms())), criteria, service.heads)

                def respond() -> Response:
                    found = ranked(service, version, vector, criteria, service.config.max_scan)
                    rows, readable = metadata(service, version, found.ids, columns)
                    hits = []
                    for place, (id, score) in enumerate(zip(found.ids.tolist(), found.scores.tolist(), strict=True)):
                        hit = {"id": id, "score": score, "image": None, "metadata": rows[place]}
                        if readable[place]:
                            hit["image"] = image_path(name, version, id)
                        if found.aesthetic is not None:
                            hit["aesthetic"] = float(found.aesthetic[place])
                        hits.append(hit)
                    if wants_parquet(request):
                        return parquet(hits)
                    rest = {"hits": hits, "scanned": found.scanned, "complete": found.complete}
                    return answer({"index": name, "version": version.manifest.version, **rest})

                return await service.threads.run(respond)

    @routes.post("/embed", response_model=EmbedResponse, openapi_extra=takes(EmbedRequest))
    async def embed(request: Request) -> Response:
        """Unit vectors of texts and images."""
        asked = await read(request, EmbedRequest, service.max_body)
        _bound("texts", len(asked.texts), service.config.max_queries)
        _bound("images", len(asked.images), service.config.max_queries)
        images = [(f"images.{i}", decode_base64(image, f"images.{i}")) for i, image in enumerate(asked.images)]
        with service.indices.use(asked.index) as (_, version):
            works = [service.text(version, text) for text in asked.texts]
            works += [service.image(version, data, field) for field, data in images]
            vectors = [vector.tolist() for vector in await asyncio.gather(*works)]
            here, dim = version.manifest.encoder.fingerprint, version.manifest.dim
        cut = len(asked.texts)
        return answer({"encoder": here, "dim": dim, "texts": vectors[:cut], "images": vectors[cut:]})

    @routes.get("/indices", response_model=IndicesResponse)
    async def indices() -> Response:
        """What is served, and what can be asked of it."""
        served = []
        for name in service.indices.names:
            if name not in service.indices.closed():
                with service.indices.use(name) as (_, version):
                    served.append({**_describe(name, version), "text": service.indices.reads_text(version)})
        heads, config = service.heads, service.config
        on = {"safety": heads.safety is not None, "violence": heads.violence is not None, "aesthetic": heads.beauty}
        features = {"deduplicate": True, **on, "image_url": config.image_url}
        limits = {"max_k": config.max_k, "max_queries": config.max_queries}
        return answer({"indices": served, "features": features, **limits})

    @routes.get("/image/{index}/{row}", response_class=Response, responses=_IMAGE)
    async def image(index: str, row: int, request: Request, version: str | None = None) -> Response:
        """The original image of a row. `version` (as in a hit's path) refuses rows of another version."""
        with service.indices.use(index) as (_, opened):
            here, rows = opened.manifest.version, opened.manifest.rows
            if version is not None and version != here:
                raise Refused(404, f"index {index} has version {here} now: search again", "version")
            if not 0 <= row < rows:
                raise Refused(404, f"index {index} has rows 0 to {rows - 1}", "row")
            tag = f'"{here}-{row}"'
            lasting = "max-age=86400, immutable" if version else "no-cache"
            headers = {"etag": tag, "cache-control": f"private, {lasting}", "x-content-type-options": "nosniff"}
            headers["content-security-policy"] = "default-src 'none'; sandbox"
            if request.headers.get("if-none-match") == tag:
                return Response(status_code=304, headers=headers)

            data = await service.threads.run(original, opened, row)
        if data is None:
            raise Refused(404, "this row's image cannot be read from a tar", "row")
        return Response(data, media_type=media_type(data), headers=headers)

    return routes


_IMAGE: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {f"image/{kind}": {} for kind in ("jpeg", "png", "webp", "gif")} | {"application/octet-stream": {}}
    },
    304: {"description": "It has not changed."},
}


def _bound(field: str, value: int, most: int) -> None:
    if value > most:
        raise Refused(422, f"{field}: {most} at most on this server", field)


def _columns(service: Service, version: OpenVersion, asked: list[str] | None) -> list[str]:
    """The columns to answer: what is asked, of those that the options allow."""
    allowed = shown(service, version)
    for number, name in enumerate(asked or []):
        if name not in allowed:
            raise Refused(
                400, f"columns.{number}: no column {name!r}; there are {', '.join(allowed)}", f"columns.{number}"
            )
    return allowed if asked is None else list(dict.fromkeys(asked))


def shown(service: Service, version: OpenVersion) -> list[str]:
    """The metadata columns of a version that answers may carry."""
    chosen = service.config.columns
    return [name for name in version.columns if not chosen or name in chosen]


def _check_filters(version: OpenVersion, asked: SearchRequest) -> None:
    for number, condition in enumerate(asked.filters):
        if condition.column not in version.columns:
            field = f"filters.{number}.column"
            raise Refused(400, f"{field}: no column {condition.column!r}; {', '.join(version.columns)}", field)


def _criteria(asked: SearchRequest) -> Criteria:
    return Criteria(
        k=asked.k,
        threshold=asked.threshold,
        modality=asked.modality,
        effort=asked.effort,
        where=asked.filters,
        unique=asked.deduplicate,
        unique_threshold=asked.deduplicate_threshold,
        safe=asked.safety,
        nonviolent=asked.violence,
        aesthetic=asked.aesthetic,
    )


def _describe(name: str, version: OpenVersion) -> dict[str, Any]:
    manifest = version.manifest
    return {
        "name": name,
        "version": manifest.version,
        "rows": manifest.rows,
        "dim": manifest.dim,
        "encoder": manifest.encoder.fingerprint,
        "modalities": version.modalities,
        "columns": version.columns,
        "recall": manifest.recall,
    }
