"""submit: what is missing, as tasks of a scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_batch.cli.arguments import Options, say

if TYPE_CHECKING:
    from clip_batch.launch.submit import Request


def slurm(options: Options) -> int:
    """Launch what is missing as SLURM job arrays; with --index, a merge behind them."""
    from clip_batch.cli import main
    from clip_batch.launch import submit

    return submit.slurm(_request(options), options.slurm, main, say)


def spark(options: Options) -> int:
    """Launch what is missing as a Spark application; with --index, merge in it too."""
    from clip_batch.launch import submit

    return submit.spark(_request(options), options.spark, say)


def _request(options: Options) -> Request:
    from clip_batch.launch.submit import Request

    index = options.index if options.target.index else ""
    return Request(options.output, index, options.storage, options.submit, options.embed, options.merge)
