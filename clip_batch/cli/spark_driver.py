"""The Spark driver's command line, which `clip-batch submit spark` hands to spark-submit by the path of this file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from clip_batch.cli.arguments import Only, escape_output
from clip_batch.cli.commands import COMMANDS
from clip_batch.cli.parser import call
from clip_batch.cli.submit import SubmitArguments
from clip_batch.config import EmbedConfig, MergeConfig, StorageConfig, SubmitConfig
from clip_batch.errors import ClipBatchError


@dataclass(frozen=True, kw_only=True)
class DriverArguments(SubmitArguments):
    """What the driver has Spark embed, and merge after that."""

    submission: str = ""
    """The submission to embed; default: all that is missing, as a new one."""


def main(words: Sequence[str] | None = None) -> int:
    """The driver, run by spark-submit: exit code 0 all committed (and merged), 1 not all, 2 usage."""
    escape_output()
    try:
        return call("driver.py", drive, sys.argv[1:] if words is None else words, [*COMMANDS.values(), drive])
    except ClipBatchError as error:
        print(f"clip-batch driver: {error}", file=sys.stderr)
        return error.exit_code


def drive(
    arguments: DriverArguments,
    submit: Annotated[SubmitConfig, Only(("tasks", "merge_tasks"))],
    embed: EmbedConfig,
    merge: MergeConfig,
    storage: Annotated[StorageConfig, Only(())],
) -> int:
    """Embed what OUT misses on the executors; with --index, merge it there.

    Storage options come from the environment or --config alone, because Spark's pages show arguments.
    """
    from clip_batch.launch.spark import drive

    return drive(arguments.output, arguments.index_folder, arguments.submission, submit, embed, merge, storage)


if __name__ == "__main__":
    raise SystemExit(main())
