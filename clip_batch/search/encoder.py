"""The encoder that made an index, loaded to encode queries."""

from __future__ import annotations

from dataclasses import replace

from clip_batch import encoders
from clip_batch.config import SearchConfig, StorageConfig
from clip_batch.encoders import Encoder
from clip_batch.types import EncoderSpec


def load_encoder(spec: EncoderSpec, config: SearchConfig, storage: StorageConfig) -> Encoder:
    """The encoder of an index, where `config` says it lies. EncoderError: it is not there, or not that one."""
    names = config.model or spec.model, config.pretrained or spec.pretrained
    if not spec.weights or names != (spec.model, spec.pretrained):
        found = encoders.resolve(*names, spec.preprocess, spec.precision, storage.storage_options)
        spec = replace(found, weights=spec.weights or found.weights, exif_rotation=spec.exif_rotation)
    return encoders.load(spec, config.device, storage.storage_options)
