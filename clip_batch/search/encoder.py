"""The encoder that made an index, loaded to encode queries."""

from __future__ import annotations

from dataclasses import replace

from clip_batch import encoders
from clip_batch.config import SearchConfig, StorageConfig
from clip_batch.encoders import Model
from clip_batch.errors import EncoderError
from clip_batch.types import EncoderSpec


def load_encoder(spec: EncoderSpec, config: SearchConfig, storage: StorageConfig) -> Model:
    """The encoder of an index, where `config` says it lies. EncoderError: it is not there, or not that one."""
    made_by = f"{spec.model} {spec.pretrained}".strip()
    names = config.model or spec.model, config.pretrained or spec.pretrained
    if not spec.weights or names != (spec.model, spec.pretrained):
        found = encoders.resolve(*names, spec.preprocess, spec.precision, storage.storage_options)
        spec = replace(found, weights=spec.weights or found.weights, exif_rotation=spec.exif_rotation)
    try:
        return encoders.load(spec, config.device, storage.storage_options)
    except encoders.OtherWeights:
        given = " ".join(names).strip()
        remedy = "leave --model and --pretrained out, or name" if config.model or config.pretrained else "give --model"
        raise EncoderError(
            f"the index was made by {made_by} with weights {spec.weights[:12]}, which {given} does not have here: "
            f"{remedy} a place with these weights"
        ) from None
