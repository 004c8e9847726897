"""Tiny models of each family with random weights, saved in their own formats, and tokenizers made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
CHINESE = "一只红苹果在桌上的照片猫狗山水天空"
SIDE = 48

TEXTS = [
    "a red apple",
    "A photo of a CAT, on a table!",
    "一只猫的照片",
    "红苹果 and 天空",
    "",
    "x",
    "word " * 200,
    "猫" * 300,
]
"""English, Chinese, both, none, and far beyond any context."""


def seeded() -> None:
    import torch

    torch.manual_seed(7)


def vision(**more: Any) -> dict[str, Any]:
    """The configuration of a vision tower of some thousands of weights."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**small, "image_size": SIDE, "patch_size": 16, **more}


def text(vocabulary: int, **more: Any) -> dict[str, Any]:
    """Likewise of a text tower."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**small, "vocab_size": vocabulary, **more}


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = [("a", "p"), ("ap", "p"), ("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>")]
    words += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)


def bert_vocabulary() -> list[str]:
    marks = [*"!?,.()[]#'：。", '"']
    pieces = [*LETTERS, *(f"##{letter}" for letter in LETTERS), *CHINESE, *(f"##{one}" for one in CHINESE), *marks]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return list(dict.fromkeys([*special, *pieces, "apple", "cat", "photo", "##s", "##ple", "red"]))


def bert_tokenizer(length: int = 16) -> Any:
    from transformers import BertTokenizer

    vocabulary = {word: number for number, word in enumerate(bert_vocabulary())}
    return BertTokenizer(vocab=vocabulary, model_max_length=length)


def siglip_tokenizer(folder: Path) -> Any:
    import sentencepiece
    from transformers import SiglipTokenizer

    lines = [" ".join(LETTERS), " ".join(CHINESE), "a photo of a red apple on a table", CHINESE] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "spiece"), vocab_size=90, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return SiglipTokenizer(
        str(folder / "spiece.model"), model_max_length=16, pad_token="</s>", model_input_names=["input_ids"]
    )


def gemma_tokenizer() -> Any:
    from transformers import GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", *LETTERS, *CHINESE, "ap", "app"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return GemmaTokenizer(vocab=vocabulary, merges=[("a", "p"), ("ap", "p")], model_max_length=16)


def roberta_tokenizer() -> Any:
    from transformers import XLMRobertaTokenizer

    words = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, *CHINESE, "▁a", "▁photo", "apple", "<mask>"]
    scores = [(word, 0.0 if number < 4 else -float(number)) for number, word in enumerate(words)]
    return XLMRobertaTokenizer(vocab=scores, model_max_length=16)


def save(folder: Path, *parts: Any) -> str:
    """The folder, once each part is saved there."""
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


def clip(folder: Path, processor: dict[str, Any] | None = None) -> str:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    seeded()
    tokenizer = clip_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=text(len(tokenizer), max_position_embeddings=16, **ends), vision_config=vision(), projection_dim=24
    )
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return save(folder, CLIPModel(config), tokenizer, CLIPImageProcessor(**{**sizes, **(processor or {})}))


def siglip(folder: Path) -> str:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    seeded()
    tokenizer = siglip_tokenizer(folder)
    config = SiglipConfig(
        text_config=text(len(tokenizer) + 8, max_position_embeddings=16, projection_size=32), vision_config=vision()
    )
    return save(folder, SiglipModel(config), tokenizer, SiglipImageProcessor(size={"height": SIDE, "width": SIDE}))


def siglip2(folder: Path) -> str:
    """The kind with patches in a grid of each image's own (NaFlex)."""
    from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model

    seeded()
    tokenizer = gemma_tokenizer()
    settings = vision(num_patches=9)
    del settings["image_size"]
    config = Siglip2Config(
        text_config=text(len(tokenizer), max_position_embeddings=16, projection_size=32), vision_config=settings
    )
    return save(folder, Siglip2Model(config), tokenizer, Siglip2ImageProcessor(max_num_patches=12))


def chinese_clip(folder: Path) -> str:
    from transformers import ChineseCLIPConfig, ChineseCLIPImageProcessor, ChineseCLIPModel

    seeded()
    tokenizer = bert_tokenizer()
    config = ChineseCLIPConfig(
        text_config=text(len(tokenizer), max_position_embeddings=64), vision_config=vision(), projection_dim=24
    )
    sizes = {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}
    return save(folder, ChineseCLIPModel(config), tokenizer, ChineseCLIPImageProcessor(**sizes))


def dinov2(folder: Path) -> str:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    seeded()
    sizes = {"size": {"shortest_edge": 56}, "crop_size": {"height": SIDE, "width": SIDE}}
    return save(folder, Dinov2Model(Dinov2Config(**vision())), BitImageProcessor(**sizes))


def vit(folder: Path) -> str:
    """A classifier: its weights have no pooler."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    seeded()
    model = ViTForImageClassification(ViTConfig(**vision()))
    return save(folder, model, ViTImageProcessor(size={"height": SIDE, "width": SIDE}))


def cn_clip(folder: Path, name: str = "ViT-B-16") -> tuple[str, Any]:
    """A checkpoint as OFA-Sys publishes them, with its vocabulary beside it, and cn_clip's own model of it."""
    import torch
    from cn_clip.clip.bert_tokenizer import FullTokenizer
    from cn_clip.clip.model import CLIP

    seeded()
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(bert_vocabulary()) + "\n")
    tower = {"vision_layers": 2, "vision_width": 320, "vision_patch_size": 16, "image_resolution": SIDE}
    if name == "RN50":
        tower = {"vision_layers": (1, 1, 2, 1), "vision_width": 16, "vision_patch_size": None, "image_resolution": 64}
    model = CLIP(
        embed_dim=24, **tower, vision_head_width=80 if name == "ViT-H-14" else 64,
        vocab_size=len(bert_vocabulary()), text_attention_probs_dropout_prob=0.1, text_hidden_act="gelu",
        text_hidden_dropout_prob=0.1, text_hidden_size=128, text_initializer_range=0.02, text_intermediate_size=96,
        text_max_position_embeddings=64, text_num_attention_heads=2, text_num_hidden_layers=2, text_type_vocab_size=2,
        tokenizer=FullTokenizer(str(vocabulary)),
    ).eval()  # fmt: skip
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 1, "name": "tiny", "state_dict": state}, folder / "clip_cn.pt")
    return str(folder / "clip_cn.pt"), model


def mclip(folder: Path) -> str:
    """A text tower in M-CLIP's format, into the space of the demo's model, with its base's configuration beside."""
    import json

    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel

    seeded()
    tokenizer = roberta_tokenizer()
    ends = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "type_vocab_size": 1}
    base = XLMRobertaConfig(**text(len(tokenizer), max_position_embeddings=18, **ends))
    tower = torch.nn.ModuleDict({
        "transformer": XLMRobertaModel(base),
        "LinearTransformation": torch.nn.Linear(32, 256),
    })  # fmt: skip
    save(folder, tokenizer)
    base.save_pretrained(folder / "base")
    torch.save(tower.state_dict(), folder / "pytorch_model.bin")
    settings = {"modelBase": "base", "transformerDimSize": 32, "imageDimSize": 256, "model_type": "M-CLIP"}
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def ofa_clip(folder: Path) -> str:
    """A checkpoint like `cn_clip`'s, of ViT-B-16, where cn_clip is not installed: random towers under its names."""
    import torch
    from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer
    from transformers import BertConfig, BertModel

    seeded()
    (folder / "vocab.txt").write_text("\n".join(bert_vocabulary()) + "\n")
    visual = VisionTransformer(
        image_size=SIDE, patch_size=16, width=128, layers=2, heads=2, mlp_ratio=4, output_dim=24, act_layer=QuickGELU,
        norm_layer=LayerNorm,
    )  # fmt: skip
    sizes = text(len(bert_vocabulary()), hidden_size=128, num_attention_heads=2, max_position_embeddings=64)
    bert = BertModel(BertConfig(**sizes, type_vocab_size=2), add_pooling_layer=False)
    state = torch.nn.ModuleDict({"visual": visual, "bert": bert}).state_dict()
    state["text_projection"] = torch.randn(128, 24) / 128**0.5
    weights = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 1, "name": "tiny", "state_dict": weights}, folder / "clip_cn.pt")
    return str(folder / "clip_cn.pt")


def timm_model(folder: Path, name: str) -> str:
    """A checkpoint of one of timm's small test models."""
    import timm
    import torch

    seeded()
    torch.save(timm.create_model(name, pretrained=False).state_dict(), folder / "model.pth")
    return str(folder / "model.pth")
