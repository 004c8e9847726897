"""submit: what is missing, as tasks of a scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_batch.cli.arguments import Options, say

if TYPE_CHECKING:
    from clip_batch.launch.submit import SubmitRequest


def slurm(options: Options) -> int:
    """Launch what is missing as SLURM job arrays; with --index, a merge behind them."""
    from clip_batch.launch import submit

    return submit.slurm(_request(options), options.slurm, options.main, say)


def spark(options: Options) -> int:
    """Launch what is missing as a Spark application; with --index, merge in it too."""
    from clip_batch.launch import submit

    return submit.spark(_request(options), options.spark, say)


def _request(options: Options) -> SubmitRequest:
    from clip_batch.launch.submit import SubmitRequest

    index = options.index if options.target.index else ""
    return SubmitRequest(options.output, index, options.storage, options.submit, options.embed, options.merge)
