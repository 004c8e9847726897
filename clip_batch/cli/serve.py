"""serve, serve-worker, end2end and demo: what answers over HTTP, and what leads there in one command."""

from __future__ import annotations

from dataclasses import asdict, replace

from clip_batch.cli.arguments import Options, answer, say
from clip_batch.cli.embed import processes
from clip_batch.errors import ConfigError


def serve(options: Options) -> int:
    """Serve indices over HTTP, with a web page."""
    from clip_batch.serve.search.app import run

    if not options.target.index:
        raise ConfigError("serve needs --index INDEX, or several as NAME=INDEX")
    run(options.target.index, options.serve, options.storage, options.database)
    return 0


def serve_worker(options: Options) -> int:
    """Plan, embed and merge over HTTP, for an orchestrator of your own; see docs/services.md."""
    from clip_batch.serve.worker.app import run

    run(options.target.allow, options.serve, options.embed, options.storage)
    return 0


def end2end(options: Options) -> int:
    """From a URL list to the web page: img2dataset, plan, embed, merge and serve, in OUTPUT; run again to go on."""
    from clip_batch.launch.end2end.account import describe
    from clip_batch.launch.end2end.end2end import end2end

    if not options.target.output:
        raise ConfigError("--output DIR is needed: the folder for images, embeddings and index")
    if options.plan.input:
        raise ConfigError("end2end takes its input from --urls: leave --input out")
    stages = options.download, options.plan, options.embed, options.merge, options.storage
    index, found = end2end(options.target.output, *stages, processes(options), say)
    answer(options, {**asdict(found), "index": index}, f"{describe(found)}\nindex: {index}")
    if not options.target.serve:
        return 0
    target = replace(options.target, index=[f"index={index}"])
    # The flags of model and device were the plan's and embed's; the index knows its encoder.
    return serve(replace(options, target=target, serve=replace(options.serve, model="", pretrained="")))


def demo(options: Options) -> int:
    """The whole line on embedded pictures with an embedded model: tars, plan, embed, merge, search."""
    from clip_batch.demo.run import run

    return run(options.target.folder, options.target.serve, options.serve)
