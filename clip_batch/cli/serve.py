"""serve, serve-worker, end2end and demo: the services over HTTP, and the commands that run all stages."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

from clip_batch.cli.arguments import JsonArguments, Only, Without, answer, say
from clip_batch.cli.embed import processes
from clip_batch.config import (
    DatabaseConfig,
    DownloadConfig,
    EmbedConfig,
    MergeConfig,
    PlanConfig,
    ServeConfig,
    StorageConfig,
)
from clip_batch.config.values import Threads
from clip_batch.errors import ConfigError

WEB = ("host", "port", "token")
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
class End2EndArguments(JsonArguments):
    """Where `end2end` writes, and how it goes on."""

    output: str
    """The folder for images, embeddings and index: a path, or any URL that fsspec opens."""
    workers: Threads = 0
    """Worker processes on this machine; 0: one per GPU, or one."""
    serve: bool = True
    """Serve the index with its web page at the end."""


def end2end(
    arguments: End2EndArguments,
    download: DownloadConfig,
    plan: PlanConfig,
    embed: EmbedConfig,
    merge: Annotated[MergeConfig, Without(("modalities",))],
    serve: Annotated[ServeConfig, Only(WEB)],
    storage: StorageConfig,
) -> int:
    """Go from a URL list to the web page: img2dataset, plan, embed, merge and serve; run it again to continue."""
    from clip_batch.launch.end2end.account import describe
    from clip_batch.launch.end2end.end2end import end2end
    from clip_batch.serve.search.app import run

    if plan.input:
        raise ConfigError("end2end takes its input from --urls: leave --input out")
    workers = processes(arguments.workers, embed)
    index, account = end2end(arguments.output, download, plan, embed, merge, storage, workers, say)
    answer(arguments, {**asdict(account), "index": index}, f"{describe(account)}\nindex: {index}")
    if arguments.serve:
        device = embed.device if serve.device == "auto" else serve.device
        run([f"index={index}"], replace(serve, device=device), storage)
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
