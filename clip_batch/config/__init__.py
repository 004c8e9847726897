"""Every option, declared once: one frozen dataclass per section.

Flags, YAML keys, environment variables, `--help`, configs/reference.yaml and docs/config.md all derive from the fields
(see `config.options`). The help text of a field is the string beneath it.
"""

from clip_batch.config.schedulers import SlurmConfig, SparkConfig, SubmitConfig
from clip_batch.config.serving import DatabaseConfig, SearchConfig, ServeConfig
from clip_batch.config.sizes import parse_bytes
from clip_batch.config.stages import (
    DownloadConfig,
    EmbedConfig,
    MergeConfig,
    PlanConfig,
    StorageConfig,
    SweepConfig,
)

__all__ = [
    "DatabaseConfig",
    "DownloadConfig",
    "EmbedConfig",
    "MergeConfig",
    "PlanConfig",
    "SearchConfig",
    "ServeConfig",
    "SlurmConfig",
    "SparkConfig",
    "StorageConfig",
    "SubmitConfig",
    "SweepConfig",
    "parse_bytes",
]
