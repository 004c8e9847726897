"""serve, serve-worker and demo: the services over HTTP, and all stages on embedded data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from clip_batch.cli.arguments import Only
from clip_batch.config import (
    DatabaseConfig,
    EmbedConfig,
    ServeConfig,
    StorageConfig,
)

WEB = ("host", "port", "token", "allowed_hosts", "max_connections", "header_timeout")
"""The flags of ServeConfig that every service takes."""


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """What is served."""

    index: list[str]
    """The index folder, or several, each as INDEX or NAME=INDEX."""


def serve(arguments: ServeArguments, serve: ServeConfig, database: DatabaseConfig, storage: StorageConfig) -> int:
    """Serve indices over HTTP, with a web page."""
    from clip_batch.serve.search.app import run

    run(arguments.index, serve, storage, database)
    return 0


@dataclass(frozen=True, kw_only=True)
class ServeWorkerArguments:
    """Where requests may read and write."""

    allow: list[str] = field(default_factory=list)
    """The folders, or URLs of some, that requests may read and write below."""


def serve_worker(
    arguments: ServeWorkerArguments,
    embed: EmbedConfig,
    serve: Annotated[ServeConfig, Only(WEB)],
    storage: StorageConfig,
) -> int:
    """Plan, embed and merge over HTTP, for an orchestrator of your own; see docs/services.md."""
    from clip_batch.serve.worker.app import run

    run(arguments.allow, serve, embed, storage)
    return 0


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """Where `demo` writes, and how it goes on."""

    folder: str = field(default="clip-batch-demo", metadata={"positional": True})
    """The folder to write."""
    serve: bool = True
    """Serve the index with its web page at the end."""


def demo(arguments: DemoArguments, serve: ServeConfig, storage: StorageConfig) -> int:
    """Run all stages on pictures and a model that come with the package: tars, plan, embed, merge, search."""
    from clip_batch.demo.run import run

    return run(arguments.folder, arguments.serve, serve)
