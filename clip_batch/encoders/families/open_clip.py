"""Models of open_clip: one of its names with a tag or a checkpoint, `hf-hub:...` or `local-dir:...`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from clip_batch.encoders import hub, open_clip_names
from clip_batch.encoders.text_tower import TrimmedTextTower
from clip_batch.encoders.word_tokenizer import by_words
from clip_batch.errors import EncoderError
from clip_batch.storage.store import file_digest
from clip_batch.types import EncoderSpec

if TYPE_CHECKING:
    import torch

    from clip_batch.encoders.torch_encoder import TorchEncoder

_OPENAI_PREPROCESSING = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
"""OpenAI's constants, which open_clip uses if a tag does not name its own."""


def weights_digest(model: str, pretrained: str) -> str:
    """sha256 over everything that decides a vector: weights, configuration, tokenizer, the tag's preprocessing.

    Local files are hashed without loading torch. A tag or a hub name is downloaded into the Hugging
    Face cache first, so planning also fetches the weights, once for all workers.
    """
    if model.startswith("local-dir:"):
        return _folder_digest(model.removeprefix("local-dir:"))
    if pretrained and os.path.isfile(pretrained):
        return hub.combine([model.replace("/", "-"), file_digest(pretrained)])
    try:
        with contextlib.nullcontext() if hub.reachable() else hub.offline():
            if model.startswith("hf-hub:"):
                return _hub_digest(model.removeprefix("hf-hub:"))
            return _tag_digest(model.replace("/", "-"), pretrained)
    except EncoderError:
        raise
    except Exception as error:
        raise EncoderError(
            f"weights of {model} {pretrained} cannot be found: {hub.line(error)}; with no network, "
            "name a checkpoint's path as --pretrained, or --model local-dir:FOLDER"
        ) from None


def _folder_digest(folder: str) -> str:
    """sha256 over all files of a folder that open_clip saved, except documents."""
    if not os.path.isfile(os.path.join(folder, "open_clip_config.json")):
        raise EncoderError(f"no open_clip_config.json in {folder}: name a folder that open_clip saved")
    names = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name)))
    parts = [f"{name} {file_digest(os.path.join(folder, name))}" for name in names if not name.endswith(".md")]
    return hub.combine(parts)


def _hub_digest(name: str) -> str:
    """sha256 over the configuration and the weights of a name on the hub."""
    from huggingface_hub import hf_hub_download
    from open_clip.pretrained import download_pretrained_from_hf

    config = hf_hub_download(name, "open_clip_config.json")
    with open(config, encoding="utf-8") as opened:
        _fetch_text(f"hf-hub:{name}", json.load(opened).get("model_cfg", {}))
    return hub.combine([file_digest(config), file_digest(download_pretrained_from_hf(name))])


def _tag_digest(model: str, tag: str) -> str:
    """sha256 over the name, the tag's weights, and the tag's settings that differ from OpenAI's."""
    settings = open_clip_names.settings(model, tag)  # a refusal does not wait for the import of open_clip
    import open_clip

    special = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
        if value and name not in ("url", "hf_hub")
    }
    special = {name: value for name, value in special.items() if _OPENAI_PREPROCESSING.get(name) != value}
    parts = [model, file_digest(open_clip.download_pretrained(settings))]
    _fetch_text(model, open_clip.get_model_config(model) or {})
    return hub.combine([*parts, json.dumps(special, sort_keys=True)] if special else parts)


def _fetch_text(model: str, settings: dict[str, Any]) -> None:
    """Download the tokenizer, and the configuration of a Hugging Face text tower, into the cache for workers."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    import open_clip

    open_clip.get_tokenizer(model)
    if name := settings.get("text_cfg", {}).get("hf_model_name"):
        hub.file(name, "config.json")


def load(spec: EncoderSpec, device: str, compiled: int) -> TorchEncoder:
    """Load the model, as `Family.load` describes."""
    from clip_batch.encoders import preprocess
    from clip_batch.encoders.torch_encoder import TextSide, TorchEncoder, place

    placement = place(spec, device, compiled)
    model, transform, tokenizer = load_model(spec.model, spec.pretrained, spec.precision, placement.device)
    preprocessing = preprocess.from_transform(transform, spec.preprocess, spec.exif_rotation)
    text_side = TextSide(tokenizer, TrimmedTextTower(model, recorded=compiled > 0))
    return TorchEncoder(model, model.encode_image, text_side, preprocessing, placement)


def load_model(model: str, pretrained: str, precision: str, device: torch.device) -> tuple[Any, Any, Any]:
    """The model on a device, its transform and its tokenizer. EncoderError: open_clip cannot load it."""
    logging.getLogger("open_clip").setLevel(logging.ERROR)
    import open_clip

    from clip_batch.encoders.undrawn import undrawn

    precision = "fp32" if precision == "int8" else precision
    options = {"pretrained": pretrained or None, "precision": precision, "device": device}
    try:
        create = partial(open_clip.create_model_and_transforms, model, **options)
        loaded, _, transform = undrawn(create, itemgetter(0))
        return loaded.eval(), transform, by_words(open_clip.get_tokenizer(model))
    except Exception as error:
        raise EncoderError(f"open_clip cannot load {model} {pretrained}: {hub.line(error)}") from None
