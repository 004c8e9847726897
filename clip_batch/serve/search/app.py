"""The search service: its routes, the limits around them, and the server that runs them."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from clip_batch import __version__
from clip_batch.config import DatabaseConfig, ServeConfig, StorageConfig
from clip_batch.config.paths import path_text
from clip_batch.errors import ConfigError
from clip_batch.serve.http.hidden import without_paths
from clip_batch.serve.http.hosts import check_hosts
from clip_batch.serve.http.limits import Guard
from clip_batch.serve.http.openapi import describe
from clip_batch.serve.http.port import check_port
from clip_batch.serve.http.responses import answer_errors, json_response
from clip_batch.serve.search import clip_retrieval, v1
from clip_batch.serve.search.assets import add_page
from clip_batch.serve.search.bus_error import name_lost_files
from clip_batch.serve.search.schema import EmbedRequest, SearchRequest
from clip_batch.serve.search.service import Service
from clip_batch.types import StrPath


def create_app(
    indices: Mapping[str, str],
    config: ServeConfig = ServeConfig(),
    storage: StorageConfig = StorageConfig(),
    databases: DatabaseConfig = DatabaseConfig(),
) -> FastAPI:
    """Return the service over named indices (name -> INDEX). It answers from `databases` if they are given.

    Raises ConfigError if there is no index, or an option does not fit.
    """
    if not indices:
        raise ConfigError("there is no index to serve: name at least one")
    service = Service(indices, config, storage, databases)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.indices.start()
        yield
        await service.close()

    app = FastAPI(title="clip-batch", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    _health(app, service)
    add_page(app, config.page_images == "direct")
    app.include_router(clip_retrieval.router(service))
    app.include_router(v1.router(service))
    bodies: list[type[BaseModel]] = [SearchRequest, EmbedRequest]
    bodies += [clip_retrieval.KnnRequest, clip_retrieval.MetadataRequest]
    describe(app, bodies, token=bool(config.token))
    answer_errors(app, service.indices.shown)
    app.add_middleware(Guard, config=config, metrics=service.metrics)
    if config.cors:  # outermost, so that a browser can read refusals too
        app.add_middleware(CORSMiddleware, allow_origins=config.cors, allow_methods=["*"], allow_headers=["*"])
    check_hosts(app, config)
    return app


def _health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def alive() -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "ok", "version": __version__}

    @app.get("/readyz", responses={503: {"description": "An index, its metadata or its encoder is not ready."}})
    async def ready() -> Response:
        """Whether every index is open with the encoder that embedded it, or why not."""
        problems, warnings = service.indices.problems(), service.indices.warnings()
        # Nobody needs a token to ask this, so paths are shown only where there is none.
        shown = without_paths if service.config.token else service.indices.shown
        data = {
            "indices": service.indices.rows(),
            "problems": {name: shown(problem) for name, problem in problems.items()},
            "warnings": {name: shown(warning) for name, warning in warnings.items()},
        }
        return json_response(data, 503 if problems else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """The metrics, in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/metrics-summary", response_class=PlainTextResponse)
    async def summary() -> str:
        """A table of the steps of a search and their share of its time, for people."""
        return service.metrics.summary()


def parse_indices(specs: list[str]) -> dict[str, str]:
    """Return name -> INDEX for specs of the form INDEX or NAME=INDEX. Raises ConfigError if two have one name."""
    named: dict[str, str] = {}
    for number, spec in enumerate(specs):
        name, separator, url = spec.partition("=")
        if not separator or "/" in name:  # a URL may contain = itself
            name, url = "index" if len(specs) == 1 else f"index{number}", spec
        if name in named:
            raise ConfigError(f"two indices are named {name!r}: give NAME=INDEX")
        named[name] = url
    return named


def make_app(
    indices: StrPath | Mapping[str, StrPath] | Iterable[StrPath],
    config: ServeConfig = ServeConfig(),
    *,
    storage: StorageConfig = StorageConfig(),
    databases: DatabaseConfig = DatabaseConfig(),
) -> FastAPI:
    """The search service as an ASGI application, for a server or a program of your own.

    `indices` is an INDEX, or several by name; a list has each as INDEX or NAME=INDEX. They are opened when the
    application starts. ConfigError: there is no index, or an option does not fit.

    Example: `uvicorn.run(make_app({"photos": "index"}), port=1234)`.
    """
    ServeConfig.expect(config=config), StorageConfig.expect(storage=storage)
    DatabaseConfig.expect(databases=databases)
    if isinstance(indices, Mapping):
        named: dict[str, str] = {name: path_text(index, f"index {name}") for name, index in indices.items()}
    else:
        several = [indices] if isinstance(indices, str | os.PathLike) else indices
        if not isinstance(several, Iterable):
            raise ConfigError(f"indices is {several!r}: give an INDEX, or several by name")
        named = parse_indices([path_text(index, "an index") for index in several])
    return create_app(named, config, storage, databases)


def run(
    indices: list[str], config: ServeConfig, storage: StorageConfig, databases: DatabaseConfig = DatabaseConfig()
) -> None:
    """Open the indices (each INDEX or NAME=INDEX) and serve until a signal."""
    import uvicorn

    from clip_batch.serve.http.connections import protocol

    named = parse_indices(indices)
    check_port(config)
    print(f"opening {', '.join(named.values())}; then serving", file=sys.stderr, flush=True)
    app = create_app(named, config, storage, databases)
    name_lost_files()
    print(f"serving {', '.join(named)} at http://{config.host}:{config.port}/", flush=True)
    print("open that address in a browser, or ask by clip_batch.Client; Ctrl-C ends it", file=sys.stderr, flush=True)
    uvicorn.run(app, host=config.host, port=config.port, http=protocol(config), log_level="warning", access_log=False)
