"""`mclip:TEXT+IMAGE`: a multilingual text tower of M-CLIP, and the open_clip model whose image space it learned.

TEXT is a folder or a hub name in M-CLIP's format: a transformers encoder, the mean over its tokens, a linear map.
IMAGE is a name of open_clip's, and `pretrained` is its tag or checkpoint. An example is
mclip:M-CLIP/XLM-Roberta-Large-Vit-B-32+ViT-B-32.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clip_batch.encoders import hub
from clip_batch.encoders.families import open_clip
from clip_batch.errors import EncoderError
from clip_batch.storage.store import file_digest
from clip_batch.types import EncoderSpec

if TYPE_CHECKING:
    import torch

    from clip_batch.encoders.torch_encoder import TextSide, TorchEncoder


def weights_digest(model: str, pretrained: str) -> str:
    """sha256 over the text tower's folder, its base's configuration, and the digest of the image side."""
    text, image = _names(model)
    folder = hub.folder(text)
    base = file_digest(hub.file(_config(folder)["modelBase"], "config.json"))
    return hub.combine([hub.folder_digest(folder), base, open_clip.weights_digest(image, pretrained)])


def _names(model: str) -> tuple[str, str]:
    """TEXT and IMAGE."""
    text, plus, image = model.removeprefix("mclip:").rpartition("+")
    if not plus or not text or not image:
        raise EncoderError(
            f"model {model!r} is not understood: write mclip:TEXT+IMAGE, a folder or hub name of M-CLIP's"
        )
    return text, image


def _config(folder: str) -> dict[str, Any]:
    """The text tower's configuration; the path of a base inside the folder becomes absolute."""
    with open(hub.file(folder, "config.json"), encoding="utf-8") as file:
        config: dict[str, Any] = json.load(file)
    if "modelBase" not in config:
        raise EncoderError(f"{folder} is not a text tower of M-CLIP: its config.json has no modelBase")
    beside = os.path.join(folder, config["modelBase"])
    return {**config, "modelBase": beside} if os.path.isdir(beside) else config


def load(spec: EncoderSpec, device: str, compiled: int) -> TorchEncoder:
    """Load the model, as `Family.load` describes."""
    from clip_batch.encoders import preprocess
    from clip_batch.encoders.torch_encoder import TorchEncoder, place

    placement = place(spec, device, compiled)
    text, image = _names(spec.model)
    model, transform, _ = open_clip.load_model(image, spec.pretrained, spec.precision, placement.device)
    preprocessing = preprocess.from_transform(transform, spec.preprocess, spec.exif_rotation)
    try:
        text_side = _text_side(hub.folder(text), placement.device, placement.dtype)
    except EncoderError:
        raise
    except Exception as error:
        raise EncoderError(f"M-CLIP's text tower {text} cannot be loaded: {hub.line(error)}") from None
    return TorchEncoder(model, model.encode_image, text_side, preprocessing, placement)


def _text_side(folder: str, device: torch.device, dtype: torch.dtype) -> TextSide:
    """The text side of a folder. EncoderError: weights or the tokenizer are missing."""
    import torch
    from transformers import AutoConfig, AutoModel

    from clip_batch.encoders.families.hf import context
    from clip_batch.encoders.torch_encoder import TextSide

    tokenizer = hub.tokenizer(folder)
    config = _config(folder)
    base_folder = os.path.dirname(hub.file(config["modelBase"], "config.json"))
    base = AutoConfig.from_pretrained(base_folder, trust_remote_code=False)
    modules = torch.nn.ModuleDict({
        "transformer": AutoModel.from_config(base, trust_remote_code=False),
        "LinearTransformation": torch.nn.Linear(config["transformerDimSize"], config["imageDimSize"]),
    })  # fmt: skip
    missing = modules.load_state_dict(_weights(folder), strict=False).missing_keys
    if missing := [name for name in missing if "position_ids" not in name and ".pooler." not in name]:
        raise EncoderError(f"the weights in {folder} lack {missing[0]}: take complete ones")
    modules = modules.eval().to(device, dtype)
    length = context(tokenizer, base)

    def tokenize(texts: Sequence[str]) -> Any:
        return tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=length)

    def tower(tokens: Any) -> torch.Tensor:
        tokens = tokens.to(device)
        mask = tokens["attention_mask"][:, :, None]
        hidden = modules["transformer"](**tokens)[0]
        rows: torch.Tensor = modules["LinearTransformation"]((hidden * mask).sum(1) / mask.sum(1))
        return rows

    return TextSide(tokenize, tower)


def _weights(folder: str) -> dict[str, Any]:
    """The weights in all weight files of a folder, by name."""
    import torch
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for name in hub.relevant(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name.endswith(".safetensors"):
            state.update(load_file(path))
        elif name.endswith(".bin"):
            state.update(torch.load(path, map_location="cpu", weights_only=True))
    return state
