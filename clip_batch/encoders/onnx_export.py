"""Exports models of open_clip, `hf:`, `timm:` and `cn-clip:` to ONNX, in folders that the family `onnx:` reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from clip_batch.encoders import hf_preprocess, hub, preprocess, transforms
from clip_batch.encoders.families import cn_clip, hf, open_clip, timm
from clip_batch.encoders.families.onnx import CONFIG
from clip_batch.encoders.onnx_runtime import write_onnx
from clip_batch.encoders.registry import locate_model
from clip_batch.errors import EncoderError


@dataclass(frozen=True)
class _Exportable:
    """A model with its two functions of tensors, examples of their inputs, and the configuration of the export."""

    model: Any
    encode_image: Callable[..., torch.Tensor]
    pixels: torch.Tensor
    encode_text: Callable[..., torch.Tensor] | None = None
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    """Examples of the inputs of `encode_text`, by name."""
    config: dict[str, Any] = field(default_factory=dict)


def export_onnx(model: str, pretrained: str, to: str) -> None:
    """Write a model to a new folder: image.onnx, text.onnx, their configuration, and the tokenizer.

    The graphs take batches of any size. EncoderError: the model cannot be loaded or exported, or `to` is not empty.
    """
    if os.path.isdir(to) and os.listdir(to):
        raise EncoderError(f"{to} is not empty: give another --to")
    os.makedirs(to, exist_ok=True)
    prefix, colon, _ = (model := locate_model(model)).partition(":")
    families = {"hf": _hf, "timm": _timm, "cn-clip": _cn_clip, "local-dir": _open_clip, "hf-hub": _open_clip}
    prepare = families.get(prefix) if colon else _open_clip
    if prepare is None:
        raise EncoderError(f"{model} cannot be exported: that is for open_clip and {', '.join(families)}")
    sides = prepare(model, pretrained, to)
    config = {"image": "image.onnx", **sides.config}
    try:
        write_onnx(sides.model, sides.encode_image, {"pixels": sides.pixels}, f"{to}/image.onnx", any_rows=True)
        if sides.encode_text:
            config["text"] = "text.onnx"
            write_onnx(sides.model, sides.encode_text, sides.tokens, f"{to}/text.onnx", any_rows=True)
    except Exception as error:  # torch's exporter raises errors of any class
        raise EncoderError(f"this model cannot be exported to ONNX: {hub.line(error)}") from None
    with open(os.path.join(to, CONFIG), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)


def _open_clip(model: str, pretrained: str, to: str) -> _Exportable:
    loaded, transform, tokenizer = open_clip.load_model(model, pretrained, "fp32", torch.device("cpu"))
    name = model
    if model.startswith("local-dir:"):
        _copy_texts(model.removeprefix("local-dir:"), to)
        name = "."
    config = {"pixels": transforms.describe(transform), "tokens": {"open_clip": name}}
    tokens = {"input_ids": tokenizer(["a"] * 2)}
    return _Exportable(loaded, loaded.encode_image, _pixels(config), loaded.encode_text, tokens, config)


def _hf(model: str, pretrained: str, to: str) -> _Exportable:
    folder = hub.folder(model.removeprefix("hf:"))
    loaded = hf.load_model(folder)
    _copy_texts(folder, to)
    prepare, normalize = hf_preprocess.from_processor(hf_preprocess.load_processor(folder), "exact")
    if normalize is None:
        raise EncoderError(f"{model} cannot be exported: its images are not of one size")
    pixels = torch.zeros(2, *prepare(preprocess.GREY, preprocess.GREY_SIDE**2).shape)
    if not hasattr(loaded, "get_text_features"):
        return _Exportable(loaded, hf.image_tower(loaded), pixels)
    tokenizer, length = hf.load_tokenizer(loaded, folder)
    tokens = tokenizer(["a"] * 2, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    names, config = hf.text_inputs(loaded, tokens), {"tokens": {"length": length}}

    def encode_text(*values: torch.Tensor) -> torch.Tensor:
        return hf.rows(loaded.get_text_features(**dict(zip(names, values, strict=True))))

    examples = {name: tokens[name] for name in names}
    return _Exportable(loaded, hf.image_tower(loaded), pixels, encode_text, examples, config)


def _timm(model: str, pretrained: str, to: str) -> _Exportable:
    loaded, transform = timm.load_model(model, pretrained)
    config = {"pixels": transforms.describe(transform)}
    return _Exportable(loaded, loaded, _pixels(config), config=config)


def _cn_clip(model: str, pretrained: str, to: str) -> _Exportable:
    loaded, transform = cn_clip.load_model(model, pretrained)
    tokenizer = cn_clip.load_tokenizer(pretrained)
    tokenizer.save_pretrained(to)
    tokens = tokenizer(["a"] * 2, padding="max_length", max_length=cn_clip.CONTEXT, return_tensors="pt")
    config = {"pixels": transforms.describe(transform), "tokens": {"length": cn_clip.CONTEXT}}

    def encode_text(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return cn_clip.encode_text(loaded, ids, mask)

    examples = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    return _Exportable(loaded, loaded["visual"], _pixels(config), encode_text, examples, config)


def _pixels(config: dict[str, Any]) -> torch.Tensor:
    """An example batch of the size that the configuration describes."""
    values = config["pixels"]
    return torch.zeros(2, 3, *(values["crop"] or values["size"]))


def _copy_texts(folder: str, to: str) -> None:
    """Copy the files of a model folder that are not weights: tokenizer, preprocessing, configuration."""
    for name in hub.relevant(os.listdir(folder)):
        if not name.endswith((".safetensors", ".bin", ".index.json")):
            shutil.copy(os.path.join(folder, name), to)
