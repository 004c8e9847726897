"""`clip-batch serve-worker`: the stages over HTTP, for any orchestrator."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse

from clip_batch import __version__
from clip_batch.config import EmbedConfig, ServeConfig, StorageConfig
from clip_batch.errors import ConfigError
from clip_batch.serve.http.connections import protocol
from clip_batch.serve.http.hosts import check_hosts
from clip_batch.serve.http.limits import Guard
from clip_batch.serve.http.metrics import Traffic
from clip_batch.serve.http.openapi import describe
from clip_batch.serve.http.port import check_port
from clip_batch.serve.http.responses import answer_errors
from clip_batch.serve.worker.allow import Allowed
from clip_batch.serve.worker.jobs import GRACE
from clip_batch.serve.worker.routes import router
from clip_batch.serve.worker.schema import MODELS
from clip_batch.serve.worker.stages import Stages

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def create_worker(
    allow: list[str], config: ServeConfig, embed: EmbedConfig, storage: StorageConfig = StorageConfig()
) -> FastAPI:
    """Return the service over the stages. Raises ConfigError if nothing is allowed, or other machines need no token."""
    if config.host not in LOOPBACK and not config.token:
        raise ConfigError(f"serve-worker on {config.host} writes for anyone who can reach it: set CLIP_BATCH_TOKEN")
    stages = Stages(Allowed(allow), embed, storage)
    traffic = Traffic()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await stages.jobs.close()

    app = FastAPI(title="clip-batch worker", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.stages = stages

    @app.get("/healthz")
    async def alive() -> dict[str, Any]:
        """Whether the worker runs, and its current job."""
        job = stages.jobs.now
        return {"status": "ok", "version": __version__, "at": job.what if job else None}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """The metrics, in Prometheus' text format."""
        return Response(traffic.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(router(stages))
    describe(app, MODELS, token=bool(config.token))
    answer_errors(app)
    app.add_middleware(Guard, config=config, metrics=traffic)
    check_hosts(app, config)
    return app


class _Server(uvicorn.Server):
    """A server that asks the job to stop as soon as a signal arrives, instead of when its request has ended."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        app: Any = self.config.app
        app.state.stages.jobs.stop()
        super().handle_exit(sig, frame)


def run(allow: list[str], config: ServeConfig, embed: EmbedConfig, storage: StorageConfig) -> None:
    """Serve until a signal. The running job then stops cleanly; at worst it leaves nothing behind."""
    app = create_worker(allow, config, embed, storage)
    check_port(config)
    print(f"worker at http://{config.host}:{config.port}/, below {', '.join(allow)}", flush=True)
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=protocol(config),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(GRACE),
    )
    signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))  # schedulers' warning
    _Server(settings).run()
