"""submit: hand what is missing to a scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from clip_batch.cli.arguments import CommandLine, OutputArguments, say
from clip_batch.config import EmbedConfig, MergeConfig, SlurmConfig, SparkConfig, StorageConfig, SubmitConfig
from clip_batch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SubmitArguments(OutputArguments):
    """What a scheduler is to embed, and to merge after that."""

    index: list[str] = field(default_factory=list)
    """The index folder INDEX, to merge OUT into once it is embedded; without it, nothing is merged."""

    @property
    def index_folder(self) -> str:
        """INDEX, or "" where nothing is to be merged. ConfigError: several are given."""
        if len(self.index) > 1:
            raise ConfigError("--index INDEX is taken once: the index folder")
        return self.index[0] if self.index else ""


def slurm(
    arguments: SubmitArguments,
    submit: SubmitConfig,
    slurm: SlurmConfig,
    embed: EmbedConfig,
    merge: MergeConfig,
    storage: StorageConfig,
    main: CommandLine,
) -> int:
    """Launch what is missing as SLURM job arrays; with --index, a merge follows them."""
    from clip_batch.launch.submit import SubmitRequest, submit_to_slurm

    request = SubmitRequest(arguments.output, arguments.index_folder, storage, submit, embed, merge)
    return submit_to_slurm(request, slurm, main, say)


def spark(
    arguments: SubmitArguments,
    submit: SubmitConfig,
    spark: SparkConfig,
    embed: EmbedConfig,
    merge: MergeConfig,
    storage: StorageConfig,
) -> int:
    """Launch what is missing as a Spark application; with --index, merge in it too."""
    from clip_batch.launch.submit import SubmitRequest, submit_to_spark

    request = SubmitRequest(arguments.output, arguments.index_folder, storage, submit, embed, merge)
    return submit_to_spark(request, spark, say)
