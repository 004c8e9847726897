"""The HTTP service: JSON search, original images read from their tars by byte range, one page."""

from __future__ import annotations

import base64
import binascii
import math
from importlib.resources import files
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from clip_batch import __version__, lineage
from clip_batch.config import SearchConfig, ServeConfig, StorageConfig, parse_bytes
from clip_batch.errors import ClipBatchError, ConfigError
from clip_batch.stages.search import Searcher

_MEDIA = {b"\xff\xd8\xff": "image/jpeg", b"\x89PN": "image/png", b"RIF": "image/webp", b"GIF": "image/gif"}


class SearchRequest(BaseModel):
    """One query: exactly one of `text`, `image` (base64 of a file), `embedding` and `id`."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = Field(None, max_length=10_000)
    image: str | None = Field(None, description="base64 of an image file")
    embedding: list[float] | None = None
    id: int | None = Field(None, ge=0, lt=2**63, description="a row of the index, to find others like it")
    index: str | None = Field(None, description="an index's name; the first one where it is absent")
    modality: Literal["image", "text"] = "image"
    k: int = Field(10, ge=1)
    effort: int | None = Field(None, ge=1, le=1_000_000, description="nprobe or efSearch; what merge tuned if absent")

    @model_validator(mode="after")
    def _one_query(self) -> SearchRequest:
        given = [self.text, self.image, self.embedding, self.id]
        if sum(value is not None for value in given) != 1:
            raise ValueError("give exactly one of text, image, embedding and id")
        if self.embedding is not None and not all(math.isfinite(value) for value in self.embedding):
            raise ValueError("embedding holds NaN or infinity")
        return self


class HitModel(BaseModel):
    """One hit; `image` is the path of its picture on this server, null where there is none."""

    id: int
    score: float
    image: str | None
    metadata: dict[str, Any]


class SearchResponse(BaseModel):
    """Hits, best first."""

    index: str
    hits: list[HitModel]


def create_app(searchers: dict[str, Searcher], config: ServeConfig = ServeConfig()) -> FastAPI:
    """The service over named, opened indices."""
    app = FastAPI(title="clip-batch", version=__version__, docs_url=None, redoc_url=None)
    limit = parse_bytes(config.max_body)
    page = (files(__package__) / "page.html").read_text()

    @app.middleware("http")
    async def bounded(request: Request, call_next: Any) -> Any:
        length = request.headers.get("content-length", "0")
        if request.method == "POST" and "content-length" not in request.headers:
            return JSONResponse({"detail": "a request needs a Content-Length"}, 411)
        if not length.isdigit() or int(length) > limit:
            return JSONResponse({"detail": f"a request may have {limit} bytes at most"}, 413)
        return await call_next(request)

    @app.exception_handler(ClipBatchError)
    async def refused(_: Request, error: ClipBatchError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400 if isinstance(error, ConfigError) else 503)

    def find(name: str | None) -> tuple[str, Searcher]:
        chosen = name or next(iter(searchers))
        if chosen not in searchers:
            raise HTTPException(404, f"no index {chosen!r}; there is {', '.join(searchers)}")
        return chosen, searchers[chosen]

    @app.get("/", response_class=HTMLResponse)
    def home() -> str:
        return page

    @app.get("/healthz")
    def alive() -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    @app.get("/readyz")
    def ready() -> dict[str, Any]:
        return {"indices": {name: searcher.manifest.rows for name, searcher in searchers.items()}}

    @app.get("/indices-list")
    def names() -> list[str]:
        return list(searchers)

    @app.post("/v1/search")
    def search(request: SearchRequest) -> SearchResponse:
        name, searcher = find(request.index)
        if request.k > config.max_k:
            raise HTTPException(422, f"k may be {config.max_k} at most")
        hits = searcher.search(_vector(searcher, request), request.k, request.modality, request.effort)[0]
        return SearchResponse(index=name, hits=[_hit(name, hit) for hit in hits])

    @app.get("/v1/image/{index}/{row}")
    def image(index: str, row: int) -> Response:
        _, searcher = find(index)
        if not 0 <= row < searcher.manifest.rows:
            raise HTTPException(404, f"index {index} has rows 0 to {searcher.manifest.rows - 1}")
        data = lineage.image(searcher.metadata([row])[0], searcher.storage)
        if data is None:
            raise HTTPException(404, "this row's image has no byte range in a tar")
        kind = next((kind for magic, kind in _MEDIA.items() if data.startswith(magic)), "application/octet-stream")
        headers = {"cache-control": "max-age=3600", "x-content-type-options": "nosniff"}
        return Response(data, media_type=kind, headers=headers)

    return app


def _vector(searcher: Searcher, request: SearchRequest) -> Any:
    if request.text is not None:
        return searcher.encode_text([request.text])
    if request.image is not None:
        try:
            data = base64.b64decode(request.image.rpartition(",")[2], validate=True)
        except binascii.Error as error:
            raise HTTPException(422, f"image is not base64: {error}") from None
        return searcher.encode_image(data)
    if request.embedding is not None:
        import numpy as np

        return np.asarray(request.embedding, np.float32)
    assert request.id is not None
    if request.id >= searcher.manifest.rows:
        raise HTTPException(404, f"the index has rows 0 to {searcher.manifest.rows - 1}")
    return searcher.reconstruct([request.id], "image")


def _hit(index: str, hit: Any) -> HitModel:
    has_image = hit.metadata.get("offset") is not None
    metadata = {name: value for name, value in hit.metadata.items() if value is not None}
    path = f"/v1/image/{index}/{hit.id}" if has_image else None
    return HitModel(id=hit.id, score=hit.score, image=path, metadata=_finite(metadata))


def _finite(metadata: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metadata.items()
    }


def run(indices: list[str], config: ServeConfig, storage: StorageConfig) -> None:
    """Open the indices (each INDEX or NAME=INDEX) and serve until a signal."""
    import uvicorn

    search = SearchConfig(device=config.device)
    searchers = {}
    for number, spec in enumerate(indices):
        name, given, url = spec.rpartition("=")
        name = name if given else ("index" if len(indices) == 1 else f"index{number}")
        if name in searchers:
            raise ConfigError(f"two indices are named {name!r}: give NAME=INDEX")
        searchers[name] = Searcher(url, storage, config=search)
        searchers[name].encode_text(["warm up"])
    print(f"serving {', '.join(searchers)} at http://{config.host}:{config.port}/", flush=True)
    uvicorn.run(create_app(searchers, config), host=config.host, port=config.port, log_level="warning")
