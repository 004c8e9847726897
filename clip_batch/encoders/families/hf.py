"""`hf:NAME` or `hf:FOLDER`: a model of Hugging Face transformers, as `save_pretrained` or its hub has it.

CLIP, SigLIP, SigLIP 2, Chinese-CLIP and whatever else has image and text features; other models of images
(DINOv2, ViT, ...) by their pooled output, without a text side.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clip_batch.encoders import hub
from clip_batch.errors import EncoderError
from clip_batch.types import EncoderSpec

if TYPE_CHECKING:
    import torch

    from clip_batch.encoders.towers import Texts, TorchEncoder, Tower

_FULL_LENGTH = ("siglip", "siglip2")
"""Models that were trained on texts padded to the context."""


def weights_digest(model: str, pretrained: str) -> str:
    """sha256 over the folder's configuration, weights, tokenizer and preprocessing, wherever it lies. EncoderError."""
    if pretrained:
        raise EncoderError(f"{model} has its weights with it: leave out --pretrained {pretrained}")
    folder = hub.folder(model.removeprefix("hf:"))
    for name in ("config.json", "preprocessor_config.json"):
        if not os.path.isfile(os.path.join(folder, name)) and not _in_processor(folder, name):
            raise EncoderError(f"no {name} in {folder}: name a folder with a model and its processor, both saved there")
    return hub.folder_digest(folder)


def _in_processor(folder: str, name: str) -> bool:
    """Whether the image processor is configured in processor_config.json, as newer versions save it."""
    path = os.path.join(folder, "processor_config.json")
    if name != "preprocessor_config.json" or not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8") as file:
        return "image_processor" in json.load(file)


def load(spec: EncoderSpec, device: str, compiled: int) -> TorchEncoder:
    """Load the model onto a device, compiled for batches of so many images (0: not); EncoderError if it cannot be."""
    from clip_batch.encoders import hf_preprocess
    from clip_batch.encoders.towers import TorchEncoder, placed

    folder = hub.folder(spec.model.removeprefix("hf:"))
    place = placed(spec, device, compiled)
    model = read(folder).to(*place)
    try:
        found = hf_preprocess.read(folder)
        texts = text_side(model, folder, place[0]) if hasattr(model, "get_text_features") else None
    except Exception as error:
        raise EncoderError(f"transformers cannot load {spec.model}: {hub.line(error)}") from None
    prepare, last = hf_preprocess.preparing(found, spec.preprocess)
    return TorchEncoder(spec, model, image_side(model), texts, prepare, last, place, compiled)


def read(folder: str) -> Any:
    """The model of a local folder, by its own class. EncoderError: it is none, or weights are missing."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    except Exception as error:
        raise EncoderError(f"transformers cannot load {folder}: {hub.line(error)}") from None
    missing = {name for name in report["missing_keys"] if not name.endswith("position_ids")}
    if missing and all(name.startswith("pooler.") for name in missing):  # random: the class token is what there is
        model.pooler = None
    elif missing:
        raise EncoderError(f"the weights in {folder} lack {min(missing)}, which would be random: take complete ones")
    return model.eval()


def image_side(model: Any) -> Tower:
    """Pixels to image features; of a model without a text side to its pooled output, or else its class token."""
    from clip_batch.encoders import hf_preprocess

    encode = getattr(model, "get_image_features", model)
    flexible = hf_preprocess.PATCHES in inspect.signature(getattr(encode, "forward", encode)).parameters

    def side(pixels: torch.Tensor) -> torch.Tensor:
        return rows(encode(**hf_preprocess.grids(pixels)) if flexible else encode(pixels))

    return side


def text_side(model: Any, folder: str, device: torch.device) -> Texts:
    """Texts to text features, by the folder's own tokenizer."""
    words, length = tokenizer(model, folder)
    padding = "max_length" if model.config.model_type in _FULL_LENGTH else True

    def side(texts: Sequence[str]) -> torch.Tensor:
        tokens = words(list(texts), return_tensors="pt", padding=padding, truncation=True, max_length=length).to(device)
        return rows(model.get_text_features(**{name: tokens[name] for name in text_inputs(model, tokens)}))

    return side


def tokenizer(model: Any, folder: str) -> tuple[Any, int]:
    """The folder's tokenizer, and the most tokens that the model takes."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return found, context(found, model.config.text_config)


def text_inputs(model: Any, tokens: Any) -> list[str]:
    """What the model takes of what the tokenizer gives."""
    known = inspect.signature(model.get_text_features).parameters
    return [name for name in tokens if name in known]


def context(tokenizer: Any, config: Any) -> int:
    """The most tokens of a text: what the tokenizer says, and the model's positions allow."""
    positions = config.max_position_embeddings
    if "roberta" in config.model_type:  # its positions begin behind the padding's id
        positions -= config.pad_token_id + 1
    return int(min(tokenizer.model_max_length, positions))


def rows(output: Any) -> torch.Tensor:
    """Rows (n, d) of what a model gives: themselves, its pooled output, or the first token's."""
    import torch

    if isinstance(output, torch.Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    found: torch.Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
    return found
