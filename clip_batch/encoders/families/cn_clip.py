"""`cn-clip:NAME` with a checkpoint of OFA-Sys's Chinese-CLIP (`clip_cn_*.pt`) as `pretrained`.

Its image tower, a ViT or a ResNet, has OpenAI's layout, which open_clip's classes have too, and its text tower is a
BERT as in transformers. So the weights fit unchanged, and their shapes give all sizes but the width of a head.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clip_batch.encoders import hub
from clip_batch.errors import EncoderError
from clip_batch.storage.store import file_digest
from clip_batch.types import EncoderSpec

if TYPE_CHECKING:
    import torch

    from clip_batch.encoders.torch_encoder import TorchEncoder

HEADS = {"ViT-B-16": 64, "ViT-L-14": 64, "ViT-L-14-336": 64, "ViT-H-14": 80, "RN50": 64}
"""The width of an attention head of the image tower, by the model's name."""

CONTEXT = 52
"""The most tokens of a text, with which all of these models were trained."""

VOCABULARY = "vocab.txt"
_SOURCE = "OFA-Sys/chinese-clip-vit-base-patch16"

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def weights_digest(model: str, pretrained: str) -> str:
    """sha256 over the name, the checkpoint and the vocabulary. EncoderError: one of them is absent."""
    name = _name(model)
    if not os.path.isfile(pretrained):
        raise EncoderError(f"{model} needs its checkpoint: give --pretrained the path of a clip_cn_*.pt")
    return hub.combine([name, file_digest(pretrained), file_digest(_vocabulary(pretrained))])


def _name(model: str) -> str:
    """The name after the prefix. EncoderError: there is no such model."""
    name = model.removeprefix("cn-clip:")
    if name not in HEADS:
        raise EncoderError(f"cn_clip has no model {name!r}: there are {', '.join(HEADS)}")
    return name


def _vocabulary(pretrained: str) -> str:
    """The path of BERT's Chinese vocabulary: beside the checkpoint, or in the models' folder on the hub."""
    beside = os.path.join(os.path.dirname(pretrained), VOCABULARY)
    if os.path.isfile(beside):
        return beside
    try:
        return hub.file(_SOURCE, VOCABULARY)
    except EncoderError:
        raise EncoderError(
            f"no {VOCABULARY} beside {pretrained}: put cn_clip's there, or prefetch with network"
        ) from None


def load(spec: EncoderSpec, device: str, compiled: int) -> TorchEncoder:
    """Load the model, as `Family.load` describes."""
    from clip_batch.encoders import preprocess
    from clip_batch.encoders.torch_encoder import TextSide, TorchEncoder, place

    placement = place(spec, device, compiled)
    model, transform = load_model(spec.model, spec.pretrained)
    model, tokenize = model.to(placement.device, placement.dtype), load_tokenizer(spec.pretrained)

    def tokens(texts: Sequence[str]) -> Any:
        options = {"padding": True, "truncation": True, "max_length": CONTEXT, "split_special_tokens": True}
        return tokenize(list(texts), return_tensors="pt", **options)

    def text_tower(tokens: Any) -> torch.Tensor:
        tokens = tokens.to(placement.device)
        return encode_text(model, tokens["input_ids"], tokens["attention_mask"])

    preprocessing = preprocess.from_transform(transform, spec.preprocess, spec.exif_rotation)
    return TorchEncoder(model, model["visual"], TextSide(tokens, text_tower), preprocessing, placement)


def load_model(model: str, pretrained: str) -> tuple[Any, Any]:
    """Both towers, in float32 on the CPU, and the transform. EncoderError: the checkpoint is not of this model."""
    import torch
    from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

    from clip_batch.encoders.transforms import to_rgb

    try:
        weights = torch.load(pretrained, map_location="cpu", weights_only=True)["state_dict"]
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
        towers = torch.nn.ModuleDict({"visual": _visual(weights, HEADS[_name(model)]), "bert": _bert(weights)})
        for name, side in towers.items():
            side.load_state_dict(_below(weights, f"{name}."))
        towers.register_buffer("text_projection", weights["text_projection"].float())
    except Exception as error:
        raise EncoderError(f"{pretrained} is not a checkpoint of {model}: {hub.line(error)}") from None
    wide: Any = towers["visual"].image_size
    size = (wide, wide) if isinstance(wide, int) else tuple(wide)
    steps = [Resize(size, InterpolationMode.BICUBIC), to_rgb, ToTensor(), Normalize(MEAN, STD)]
    return towers.eval(), Compose(steps)


def encode_text(towers: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rows (n, d) of token ids and their attention mask, both (n, length)."""
    rows: torch.Tensor = towers["bert"](ids, attention_mask=mask)[0][:, 0] @ towers.text_projection
    return rows


def load_tokenizer(pretrained: str) -> Any:
    """BERT's tokenizer with the checkpoint's vocabulary."""
    from transformers import BertTokenizer

    return BertTokenizer(_vocabulary(pretrained), do_lower_case=True)


def _below(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The weights of one side, without BERT's pooler, which is not used."""
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix) and not name.startswith(("bert.pooler", "bert.embeddings.position_ids"))
    }


def _visual(weights: dict[str, Any], head: int) -> torch.nn.Module:
    """open_clip's image tower with the sizes of the weights and OpenAI's activation."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer

    first = weights["visual.conv1.weight"]
    if "visual.proj" not in weights:
        width, (positions, _) = 2 * len(first), weights["visual.attnpool.positional_embedding"].shape
        output, _ = weights["visual.attnpool.c_proj.weight"].shape
        layers = [_count(weights, f"visual.layer{number}.") for number in range(1, 5)]
        resnet: torch.nn.Module = ModifiedResNet(layers, output, width * 32 // head, _side(positions) * 32, width)
        return resnet
    width, output = weights["visual.proj"].shape
    patch = first.shape[-1]
    tower: torch.nn.Module = VisionTransformer(
        image_size=_side(len(weights["visual.positional_embedding"])) * patch,
        patch_size=patch,
        width=width,
        layers=_count(weights, "visual.transformer.resblocks."),
        heads=width // head,
        mlp_ratio=len(weights["visual.transformer.resblocks.0.mlp.c_fc.weight"]) / width,
        output_dim=output,
        act_layer=QuickGELU,
        norm_layer=LayerNorm,
    )
    return tower


def _bert(weights: dict[str, Any]) -> Any:
    """transformers' BERT with the sizes of the weights."""
    from transformers import BertConfig, BertModel

    words, width = weights["bert.embeddings.word_embeddings.weight"].shape
    config = BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=_count(weights, "bert.encoder.layer."),
        num_attention_heads=width // 64,
        intermediate_size=len(weights["bert.encoder.layer.0.intermediate.dense.weight"]),
        max_position_embeddings=len(weights["bert.embeddings.position_embeddings.weight"]),
        type_vocab_size=len(weights["bert.embeddings.token_type_embeddings.weight"]),
    )
    return BertModel(config, add_pooling_layer=False)


def _count(weights: dict[str, Any], prefix: str) -> int:
    """The number of layers whose names begin with a prefix and a number."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})


def _side(positions: int) -> int:
    """Patches along a side of the image, given all positions; one of them is the class token's."""
    return math.isqrt(positions - 1)
