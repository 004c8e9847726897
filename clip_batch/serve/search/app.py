"""The HTTP service: its routes put together, its limits around them, and the server that runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException

from clip_batch import __version__
from clip_batch.config import DatabaseConfig, ServeConfig, StorageConfig
from clip_batch.errors import ClipBatchError, ConfigError
from clip_batch.serve.http.errors import Refused
from clip_batch.serve.http.limits import Guard, answer, refusal
from clip_batch.serve.http.openapi import describe
from clip_batch.serve.search import clip_retrieval, v1
from clip_batch.serve.search.assets import add_page
from clip_batch.serve.search.schema import EmbedRequest, SearchRequest
from clip_batch.serve.search.service import Service


def create_app(
    indices: Mapping[str, str],
    config: ServeConfig = ServeConfig(),
    storage: StorageConfig = StorageConfig(),
    databases: DatabaseConfig = DatabaseConfig(),
) -> FastAPI:
    """The service over named indices (name -> INDEX), answered from `databases` where those are named.

    ConfigError: there is no index, or an option does not fit.
    """
    service = Service(indices, config, storage, databases)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.indices.start()
        yield
        await service.close()

    app = FastAPI(title="clip-batch", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    _health(app, service)
    add_page(app)
    app.include_router(clip_retrieval.router(service))
    app.include_router(v1.router(service))
    describe(app, [SearchRequest, EmbedRequest, clip_retrieval.KnnRequest, clip_retrieval.MetadataRequest])
    answer_errors(app)
    app.add_middleware(Guard, config=config, metrics=service.metrics)
    if config.cors:  # outermost: a browser must be able to read refusals too
        app.add_middleware(CORSMiddleware, allow_origins=config.cors, allow_methods=["*"], allow_headers=["*"])
    return app


def _health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def alive() -> dict[str, str]:
        """That the server runs."""
        return {"status": "ok", "version": __version__}

    @app.get("/readyz", responses={503: {"description": "An index, its metadata or its encoder is not ready."}})
    async def ready() -> Response:
        """That every index is open with the encoder that made it, or why not."""
        problems, indices = service.indices.problems(), service.indices.rows()
        data = {"indices": indices, "problems": problems, "warnings": service.indices.warnings()}
        return answer(data, 503 if problems else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """What is measured, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/metrics-summary", response_class=PlainTextResponse)
    async def summary() -> str:
        """The steps of a search with their share, for people."""
        return service.metrics.summary()


def answer_errors(app: FastAPI) -> None:
    """Every error as {"detail": one line, "field": where}."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return refusal(error)

    @app.exception_handler(ClipBatchError)
    async def failed(_: Request, error: ClipBatchError) -> Response:
        return refusal(Refused(400 if isinstance(error, ConfigError) else 503, str(error)))

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        found = refusal(Refused(error.status_code, str(error.detail)))
        found.headers.update(error.headers or {})
        return found

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first: dict[str, Any] = error.errors()[0]
        field = ".".join(map(str, first["loc"][1:]))
        return refusal(Refused(422, f"{field}: {first['msg']}", field))


def parse_indices(specs: list[str]) -> dict[str, str]:
    """name -> INDEX of specs, each INDEX or NAME=INDEX; ConfigError where a name comes twice."""
    named: dict[str, str] = {}
    for number, spec in enumerate(specs):
        name, given, url = spec.partition("=")
        if not given or "/" in name:  # a URL may hold = itself
            name, url = "index" if len(specs) == 1 else f"index{number}", spec
        if name in named:
            raise ConfigError(f"two indices are named {name!r}: give NAME=INDEX")
        named[name] = url
    return named


def run(
    indices: list[str], config: ServeConfig, storage: StorageConfig, databases: DatabaseConfig = DatabaseConfig()
) -> None:
    """Open the indices (each INDEX or NAME=INDEX) and serve until a signal."""
    import uvicorn

    named = parse_indices(indices)
    app = create_app(named, config, storage, databases)
    print(f"serving {', '.join(named)} at http://{config.host}:{config.port}/", flush=True)
    uvicorn.run(app, host=config.host, port=config.port, log_level="warning", access_log=False)
