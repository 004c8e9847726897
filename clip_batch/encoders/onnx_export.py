"""Exports a model of open_clip, `hf:`, `timm:` or `cn-clip:` to ONNX, for the family `onnx:` to read."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from clip_batch.encoders import _located, hf_preprocess, hub, preprocess
from clip_batch.encoders.families import cn_clip, hf, open_clip, timm
from clip_batch.encoders.families.onnx import CONFIG
from clip_batch.encoders.onnx_runtime import Side
from clip_batch.errors import EncoderError


@dataclass(frozen=True)
class _Sides:
    """What is exported: a model, its two functions of tensors, examples of these by name, and its configuration."""

    model: Any
    image: Callable[..., torch.Tensor]
    blank: torch.Tensor
    text: Callable[..., torch.Tensor] | None = None
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def export_onnx(model: str, pretrained: str, to: str) -> None:
    """Write the model to a new folder as image.onnx, text.onnx and their configuration, for batches of any size.

    EncoderError: it cannot be had or exported, or the folder is not empty.
    """
    if os.path.isdir(to) and os.listdir(to):
        raise EncoderError(f"{to} is not empty: give another --to")
    os.makedirs(to, exist_ok=True)
    prefix, colon, _ = (model := _located(model)).partition(":")
    ways = {"hf": _hf, "timm": _timm, "cn-clip": _cn_clip, "local-dir": _open_clip, "hf-hub": _open_clip}
    way = ways.get(prefix) if colon else _open_clip
    if way is None:
        raise EncoderError(f"{model} cannot be exported: that is for open_clip and {', '.join(ways)}")
    sides = way(model, pretrained, to)
    config = {"image": "image.onnx", **sides.config}
    _write(sides.model, sides.image, {"pixels": sides.blank}, os.path.join(to, "image.onnx"))
    if sides.text:
        config["text"] = "text.onnx"
        _write(sides.model, sides.text, sides.tokens, os.path.join(to, "text.onnx"))
    with open(os.path.join(to, CONFIG), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)


def _open_clip(model: str, pretrained: str, to: str) -> _Sides:
    made, transform, tokenizer = open_clip.read(model, pretrained, "fp32", torch.device("cpu"))
    name = model
    if model.startswith("local-dir:"):
        _copy(model.removeprefix("local-dir:"), to)
        name = "."
    config = {**_pixels(transform), "tokens": {"open_clip": name}}
    return _Sides(
        made, made.encode_image, _blank(config), made.encode_text, {"input_ids": tokenizer(["a"] * 2)}, config
    )


def _hf(model: str, pretrained: str, to: str) -> _Sides:
    folder = hub.folder(model.removeprefix("hf:"))
    made = hf.read(folder)
    _copy(folder, to)
    prepare, last = hf_preprocess.preparing(hf_preprocess.read(folder), "exact")
    if last is None:
        raise EncoderError(f"{model} cannot be exported: its images are not of one size")
    blank = torch.zeros(2, *prepare(preprocess.GREY, preprocess.GREY_SIDE**2).shape)
    if not hasattr(made, "get_text_features"):
        return _Sides(made, hf.image_side(made), blank)
    tokenizer, length = hf.tokenizer(made, folder)
    tokens = tokenizer(["a"] * 2, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    names, config = hf.text_inputs(made, tokens), {"tokens": {"length": length}}

    def text(*values: torch.Tensor) -> torch.Tensor:
        return hf.rows(made.get_text_features(**dict(zip(names, values, strict=True))))

    return _Sides(made, hf.image_side(made), blank, text, {name: tokens[name] for name in names}, config)


def _timm(model: str, pretrained: str, to: str) -> _Sides:
    made, transform = timm.read(model, pretrained)
    config = _pixels(transform)
    return _Sides(made, made, _blank(config), config=config)


def _cn_clip(model: str, pretrained: str, to: str) -> _Sides:
    made, transform = cn_clip.read(model, pretrained)
    tokenizer = cn_clip.tokenizer(pretrained)
    tokenizer.save_pretrained(to)
    tokens = tokenizer(["a"] * 2, padding="max_length", max_length=cn_clip.CONTEXT, return_tensors="pt")
    config = {**_pixels(transform), "tokens": {"length": cn_clip.CONTEXT}}
    names = ("input_ids", "attention_mask")

    def text(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return cn_clip.encode_text(made, ids, mask)

    return _Sides(made, made["visual"], _blank(config), text, {name: tokens[name] for name in names}, config)


def _pixels(transform: Any) -> dict[str, Any]:
    return {"pixels": preprocess.described(*preprocess.split(transform))}


def _blank(config: dict[str, Any]) -> torch.Tensor:
    values = config["pixels"]
    return torch.zeros(2, 3, *(values["crop"] or values["size"]))


def _copy(folder: str, to: str) -> None:
    """The files of a model folder that are no weights: tokenizer, preprocessing, configuration."""
    for name in hub.relevant(os.listdir(folder)):
        if not name.endswith((".safetensors", ".bin", ".index.json")):
            shutil.copy(os.path.join(folder, name), to)


def _write(model: Any, encode: Callable[..., torch.Tensor], values: dict[str, torch.Tensor], path: str) -> None:
    """One side as an ONNX file, of any number of rows."""
    rows = torch.export.Dim("rows")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter advises how to call it
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                Side(model, encode), tuple(values.values()), path, dynamo=True, verbose=False,
                input_names=list(values), output_names=["embeds"], dynamic_shapes=(tuple({0: rows} for _ in values),),
            )  # fmt: skip
    except Exception as error:  # it raises what it likes
        raise EncoderError(f"this model cannot be exported to ONNX: {hub.line(error)}") from None
    finally:
        logging.disable(before)
