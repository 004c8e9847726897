"""models: what `--model` and `--pretrained` may name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from clip_batch.cli.arguments import JsonArguments, answer
from clip_batch.config import StorageConfig


@dataclass(frozen=True, kw_only=True)
class ModelsArguments(JsonArguments):
    """Which models `models` lists."""

    words: list[str] = field(default_factory=list, metadata={"positional": True})
    """Words that all must be in a model's name, tag, licence or source, or `cached`; without any, all models."""


def models(arguments: ModelsArguments, storage: StorageConfig) -> int:
    """List models and their tags: dimension, image size, arithmetic, licence, and what is cached on this machine."""
    from clip_batch.encoders.model_list import describe, model_list

    rows = model_list(arguments.words)
    answer(arguments, [asdict(row) for row in rows], describe(rows))
    return 0
