"""run and end2end: the whole line, from one's own data or from a list of URLs to the web page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from shlex import quote
from typing import Annotated

from clip_batch.cli.arguments import JsonArguments, Only, Without, answer, say
from clip_batch.cli.serve import WEB
from clip_batch.config import (
    DownloadConfig,
    EmbedConfig,
    MergeConfig,
    PlanConfig,
    ServeConfig,
    StorageConfig,
    extras,
)
from clip_batch.config.values import Threads
from clip_batch.errors import ConfigError
from clip_batch.types import counted, format_counts


@dataclass(frozen=True, kw_only=True)
class LineArguments(JsonArguments):
    """How the whole line is run, and how it goes on."""

    workers: Threads = 0
    """Worker processes on this machine; 0: one per GPU, or one."""
    serve: bool = True
    """Serve the index with its web page at the end."""


@dataclass(frozen=True, kw_only=True)
class RunArguments(LineArguments):
    """What `run` embeds, and where it writes."""

    spec: list[str] = field(default_factory=list, metadata={"positional": True})
    """The same as --input: a folder of pictures, tars, Parquet files, or a list of URLs; it looks which it is."""
    output: str = ""
    """The folder for embeddings and index, a path or URL; default: clip-batch-NAME here, or beside the input."""


def run(
    arguments: RunArguments,
    download: Annotated[DownloadConfig, Only(("url_column", "caption_column", "img2dataset"))],
    plan: PlanConfig,
    embed: EmbedConfig,
    merge: Annotated[MergeConfig, Without(("modalities",))],
    serve: Annotated[ServeConfig, Only(WEB)],
    storage: StorageConfig,
) -> int:
    """Go from your pictures to the web page: plan, embed, merge and serve; run it again to continue."""
    specs = [*arguments.spec, *plan.input]
    if not specs:
        raise ConfigError("name what to embed: clip-batch run FOLDER (of pictures), tars, Parquet, or a list of URLs")
    extras.require("embed", "merge", *(["serve"] if arguments.serve else []))
    _check_port(arguments, serve)
    from clip_batch.launch.end2end import paths
    from clip_batch.launch.line import output_folder, record_spec, run_line, url_list
    from clip_batch.plan import paths as output_paths

    folder = output_folder(arguments.output, specs)
    say(f"all is written to {folder}; run the same command again to go on after a stop")
    if urls := url_list(specs, plan.format, storage, say):
        say(f"{urls} is a list of URLs: its images are downloaded first, as by clip-batch end2end")
        line = End2EndArguments(
            output=folder, **{name: getattr(arguments, name) for name in ("json", "workers", "serve")}
        )
        record_spec(folder, specs, storage)
        return end2end(line, replace(download, urls=urls), replace(plan, input=[]), embed, merge, serve, storage)
    plan = replace(plan, input=specs)
    then = "serve" if arguments.serve else ""
    index, state = run_line(folder, plan, embed, merge, storage, arguments.workers, say, then)
    failed = sum(state.failures.values())
    text = f"{counted(state.rows, 'sample')} embedded, {failed:,} listed as failed"
    if failed:
        text += f" ({format_counts(state.failures)}), each in {folder}/{paths.OUTPUT}/{output_paths.FAILURES}/*.parquet"
    text += f"\nindex: {index}"
    text += f'\nsearch: clip-batch search --index {quote(index)} --text "a red bicycle"'
    values = {"index": index, "rows": state.rows, "failed": state.failures}
    answer(arguments, values, text)
    return _serve(arguments, index, embed, serve, storage)


def _check_port(arguments: LineArguments, serve: ServeConfig) -> None:
    """Refuse at once what the last step would refuse."""
    if arguments.serve:
        from clip_batch.serve.http.port import check_port

        check_port(serve)


def _serve(arguments: LineArguments, index: str, embed: EmbedConfig, serve: ServeConfig, storage: StorageConfig) -> int:
    if arguments.serve:
        from clip_batch.serve.search.app import run as serve_indices

        device = embed.device if serve.device == "auto" else serve.device
        serve_indices([f"index={index}"], replace(serve, device=device), storage)
    return 0


@dataclass(frozen=True, kw_only=True)
class End2EndArguments(LineArguments):
    """Where `end2end` writes."""

    output: str
    """The folder for images, embeddings and index: a path, or any URL that fsspec opens."""


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
    if plan.input:
        raise ConfigError("end2end takes its input from --urls: leave --input out")
    extras.require("embed", "merge", *(["serve"] if arguments.serve else []))
    _check_port(arguments, serve)
    from clip_batch.launch.end2end.account import describe
    from clip_batch.launch.end2end.end2end import end2end

    index, account = end2end(arguments.output, download, plan, embed, merge, storage, arguments.workers, say)
    answer(arguments, {**asdict(account), "index": index}, f"{describe(account)}\nindex: {index}")
    return _serve(arguments, index, embed, serve, storage)
