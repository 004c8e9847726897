"""What a command is given, and how it answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from clip_batch.config import (
    DatabaseConfig,
    DownloadConfig,
    EmbedConfig,
    MergeConfig,
    PlanConfig,
    SearchConfig,
    ServeConfig,
    SlurmConfig,
    SparkConfig,
    StorageConfig,
    SubmitConfig,
    SweepConfig,
    TargetConfig,
)
from clip_batch.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """One instance of each section, filled from flags, environment and file."""

    target: TargetConfig
    storage: StorageConfig
    download: DownloadConfig
    plan: PlanConfig
    embed: EmbedConfig
    merge: MergeConfig
    sweep: SweepConfig
    submit: SubmitConfig
    slurm: SlurmConfig
    spark: SparkConfig
    search: SearchConfig
    serve: ServeConfig
    database: DatabaseConfig
    main: Callable[[Sequence[str]], int]
    """The command line itself, for commands that have a scheduler run others."""

    @property
    def output(self) -> str:
        """OUT; ConfigError if it is not given."""
        if not self.target.output:
            raise ConfigError("--output OUT is needed: the embeddings folder")
        return self.target.output

    @property
    def index(self) -> str:
        """INDEX; ConfigError unless it is given, once."""
        if len(self.target.index) != 1:
            raise ConfigError("--index INDEX is needed, once: the index folder")
        return self.target.index[0]


def say(text: str) -> None:
    """Progress, for people: to standard error."""
    print(text, file=sys.stderr, flush=True)


def answer(options: Options, value: Any, text: str) -> None:
    """The result, to standard output: the value with --json, else the text."""
    print(json.dumps(value, indent=1, ensure_ascii=False) if options.target.json else text, flush=True)
