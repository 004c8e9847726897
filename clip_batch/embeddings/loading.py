"""Loads the encoder of a worker, compiled where that is asked for or pays, and says how large its batches are."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from clip_batch import encoders
from clip_batch.config import EmbedConfig
from clip_batch.embeddings.advice import planned_samples
from clip_batch.encoders.device import pick_device
from clip_batch.encoders.encoder import CannotCompile, Model
from clip_batch.types import EncoderSpec, Partition, Plan

COMPILE_FROM = 50_000
"""Samples from which a GPU's model is compiled unless it is said otherwise: it takes as long as they gain by it."""

_SAMPLE_BYTES = 50_000.0
"""Bytes of a sample where samples were not counted."""


def batch_size(config: EmbedConfig) -> int:
    """The number of images in one forward pass."""
    return config.batch_size or (32 if pick_device(config.device) == "cpu" else 512)


def load_encoder(spec: EncoderSpec, config: EmbedConfig, options: dict[str, Any] | None, many: bool = True) -> Model:
    """The encoder of a spec, as `encoders.load` gives it, for a worker that has `many` samples to embed, or few.

    By default it is compiled on a GPU for many; where it cannot be, it runs as it is, with a warning. EncoderError:
    the encoder cannot be loaded, or not be compiled though `config.compile` is set.
    """
    wanted = many and pick_device(config.device) != "cpu" if config.compile is None else config.compile
    try:
        return encoders.load(spec, config.device, options, batch_size(config) if wanted else 0)
    except CannotCompile as error:
        if config.compile:
            raise
        warnings.warn(f"the model runs uncompiled, and slower: {error}", stacklevel=2)
        return encoders.load(spec, config.device, options, 0)


def are_many(plan: Plan, partitions: list[Partition]) -> bool:
    """Whether these partitions of a plan have so many samples that compiling a model pays."""
    return (planned_samples(replace(plan, partitions=tuple(partitions)), _SAMPLE_BYTES) or 0) >= COMPILE_FROM
