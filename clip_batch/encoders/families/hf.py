"""`hf:NAME` or `hf:FOLDER`: a model of Hugging Face transformers, from the hub or saved by `save_pretrained`.

CLIP, SigLIP, SigLIP 2, Chinese-CLIP and all others that have image and text features; also models of images alone
(DINOv2, ViT, ...), by their pooled output.
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

    from clip_batch.encoders.torch_encoder import ImageTower, TextSide, TorchEncoder

_FULL_LENGTH = ("siglip", "siglip2")
"""Types of models that were trained on texts padded to the context."""


def weights_digest(model: str, pretrained: str) -> str:
    """sha256 over the model folder's configuration, weights, tokenizer and preprocessing."""
    if pretrained:
        raise EncoderError(f"{model} has its own weights: leave out --pretrained {pretrained}")
    folder = hub.folder(model.removeprefix("hf:"))
    for name in ("config.json", "preprocessor_config.json"):
        if not os.path.isfile(os.path.join(folder, name)) and not _is_in_processor_config(folder, name):
            raise EncoderError(f"no {name} in {folder}: name a folder with a model and its processor, both saved there")
    return hub.folder_digest(folder)


def _is_in_processor_config(folder: str, name: str) -> bool:
    """Whether processor_config.json configures the image processor, as newer versions of transformers save it."""
    path = os.path.join(folder, "processor_config.json")
    if name != "preprocessor_config.json" or not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8") as file:
        return "image_processor" in json.load(file)


def load(spec: EncoderSpec, device: str, compiled: int) -> TorchEncoder:
    """Load the model, as `Family.load` describes."""
    from clip_batch.encoders import hf_preprocess
    from clip_batch.encoders.torch_encoder import TorchEncoder, place

    folder = hub.folder(spec.model.removeprefix("hf:"))
    placement = place(spec, device, compiled)
    try:
        processor = hf_preprocess.load_processor(folder)
    except Exception as error:
        raise EncoderError(f"transformers cannot load the processor of {spec.model}: {hub.line(error)}") from None
    preprocessing = hf_preprocess.from_processor(processor, spec.preprocess, spec.exif_rotation)
    model = load_model(folder).to(placement.device, placement.dtype)
    if not hasattr(model, "get_image_features") and "pixel_values" not in inspect.signature(model.forward).parameters:
        raise EncoderError(f"{spec.model} has no image side: take another model, see docs/models.md")
    try:
        texts = text_side(model, folder, placement.device) if hasattr(model, "get_text_features") else None
    except EncoderError:
        raise
    except Exception as error:
        raise EncoderError(f"transformers cannot load {spec.model}: {hub.line(error)}") from None
    return TorchEncoder(model, image_tower(model), texts, preprocessing, placement)


def load_model(folder: str) -> Any:
    """The model of a local folder. EncoderError: transformers cannot load it, or weights are missing."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"output_loading_info": True, "local_files_only": True, "trust_remote_code": False}
    try:
        model, report = _model_class(folder).from_pretrained(folder, **options)
    except Exception as error:
        raise EncoderError(f"transformers cannot load {folder}: {hub.line(error)}") from None
    missing = {name for name in report["missing_keys"] if not name.endswith("position_ids")}
    if missing and all(name.startswith("pooler.") for name in missing):  # they would be random; the class token is used
        model.pooler = None
    elif missing:
        raise EncoderError(f"the weights in {folder} lack {min(missing)}, which would be random: take complete ones")
    return model.eval()


def _model_class(folder: str) -> Any:
    """The class of a folder's model: AutoModel, or that of a tower with its projection, which AutoModel would drop."""
    import transformers

    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        architecture = "".join((json.load(file).get("architectures") or [])[:1])
    projected = architecture.endswith("VisionModelWithProjection")
    return getattr(transformers, architecture if projected else "AutoModel")


def image_tower(model: Any) -> ImageTower:
    """From pixels to image features, or to the pooled output or class token of a model that has no such features."""
    from clip_batch.encoders import hf_preprocess

    encode = getattr(model, "get_image_features", model)
    in_patches = hf_preprocess.PATCH_GRID in inspect.signature(getattr(encode, "forward", encode)).parameters

    def tower(pixels: torch.Tensor) -> torch.Tensor:
        return rows(encode(**hf_preprocess.patch_inputs(pixels)) if in_patches else encode(pixels))

    return tower


def text_side(model: Any, folder: str, device: torch.device) -> TextSide:
    """From texts to text features, with the folder's own tokenizer."""
    from clip_batch.encoders.torch_encoder import TextSide

    tokenizer, length = load_tokenizer(model, folder)
    padding = "max_length" if model.config.model_type in _FULL_LENGTH else True

    def tokenize(texts: Sequence[str]) -> Any:
        options = {"padding": padding, "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = tokenizer(list(texts), **options)
        if "attention_mask" in tokens:
            _show_padding(tokens["attention_mask"])
        return tokens

    def tower(tokens: Any) -> torch.Tensor:
        tokens = tokens.to(device)
        return rows(model.get_text_features(**{name: tokens[name] for name in text_inputs(model, tokens)}))

    return TextSide(tokenize, tower)


def _show_padding(mask: torch.Tensor) -> None:
    """Let a text without a token see its padding: attention to nothing gives other vectors on each device."""
    mask[~mask.any(dim=1)] = 1


def load_tokenizer(model: Any, folder: str) -> tuple[Any, int]:
    """The folder's tokenizer, and the most tokens that the model takes. EncoderError: the folder has none."""
    tokenizer = hub.tokenizer(folder)
    return tokenizer, context(tokenizer, model.config.text_config)


def text_inputs(model: Any, tokens: Any) -> list[str]:
    """The names of the tokenizer's outputs that the model takes."""
    parameters = inspect.signature(model.get_text_features).parameters
    return [name for name in tokens if name in parameters]


def context(tokenizer: Any, config: Any) -> int:
    """The most tokens of a text that both the tokenizer and the model's positions allow."""
    positions = config.max_position_embeddings
    if "roberta" in config.model_type:  # its positions begin after the id of the padding
        positions -= config.pad_token_id + 1
    return int(min(tokenizer.model_max_length, positions))


def rows(output: Any) -> torch.Tensor:
    """The rows (n, d) in a model's output: the output itself, its projection or pooled output, or the first token's."""
    import torch

    if isinstance(output, torch.Tensor):
        return output
    features: torch.Tensor | None = getattr(output, "image_embeds", None)
    if features is None:
        features = getattr(output, "pooler_output", None)
    if features is None:
        features = output.last_hidden_state[:, 0]
    return features.flatten(1) if features.shape[2:].numel() == 1 else features
