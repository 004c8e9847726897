"""Trains the demo's CLIP on the embedded images, on a CPU, from random weights.

    python -m clip_batch.demo.train --output FOLDER [--steps N] [--seed N]
    python -m clip_batch.demo.train --evaluate FOLDER

The model is open_clip's own CLIP with two small towers. Each step takes a seventh of the images,
one English and one Chinese text for each, and contrasts both languages with the images. A keyword
belongs to many images; all of those in the step are right answers. Equal seeds, versions and
numbers of threads give equal weights.
"""

import argparse
import io
import json
import logging
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from clip_batch.demo.captions import LANGUAGES, Language, caption, name_forms, plain
from clip_batch.demo.data import load
from clip_batch.demo.evaluate import evaluate, report
from clip_batch.demo.tokenizer import CONTEXT_LENGTH, save_tokenizer, train_tokenizer

LEARNED_TOKENS = 5500
IMAGE_SIZE = 64
BATCH = 273  # divides 1,911, so that every step has as many images and every epoch has all of them
TEXT_CHUNKS = 3
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
WARMUP_STEPS = 150
MAX_LOGIT_SCALE = math.log(100)
_TEMPLATES: dict[Language, list[str]] = {
    "en": ["{} emoji", "a picture of {}", "an emoji of {}", "an image of a {}", "{} icon"],
    "zh": ["{}的图片", "{}表情", "一张{}的图", "{}图标", "{}的表情符号"],
}

logger = logging.getLogger(__name__)


def model_config(vocabulary: int) -> dict[str, Any]:
    """The content of `open_clip_config.json` for a tokenizer of `vocabulary` tokens."""
    return {
        "model_cfg": {
            "embed_dim": 192,
            "vision_cfg": {
                "image_size": IMAGE_SIZE,
                "layers": 4,
                "width": 192,
                "head_width": 48,
                "patch_size": 16,
            },
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": vocabulary,
                "hf_tokenizer_name": "clip-batch-demo",
                "width": 192,
                "heads": 4,
                "layers": 3,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def export(model: nn.Module, folder: Path) -> None:
    """Write the weights to `folder` in half precision; the file appears only when it is complete."""
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    partial = folder / "open_clip_model.safetensors.partial"
    save_file(weights, partial)
    partial.chmod(0o644)  # safetensors creates files that only their owner can read
    os.replace(partial, folder / "open_clip_model.safetensors")


class Texts:
    """Draws training texts for images, with the images that each text is right for.

    A text is a name in one of its forms, a name with keywords, the bilingual caption, or
    keywords alone. A name is right for the images of that name; keywords are right for the
    images that have all of them.
    """

    def __init__(self, rows: list[dict[str, Any]], rng: random.Random) -> None:
        self.rng = rng
        self.rows = rows
        self.forbidden = {plain(text) for row in rows for text in row["held_out"]}
        self.forms = {
            language: [name_forms(row[f"name_{language}"], language) for row in rows] for language in LANGUAGES
        }
        self.named: dict[str, set[int]] = {}
        self.described: dict[str, set[int]] = {}
        for language in LANGUAGES:
            for index, row in enumerate(rows):
                names = [plain(form) for form in self.forms[language][index]]
                for name in names:
                    self.named.setdefault(name, set()).add(index)
                for text in [*names, *map(plain, row[f"keywords_{language}"])]:
                    self.described.setdefault(text, set()).add(index)

    def corpus(self) -> list[str]:
        """All names and keywords, each as often as images have it."""
        return [
            text
            for index, row in enumerate(self.rows)
            for language in LANGUAGES
            for text in [*self.forms[language][index], *row[f"keywords_{language}"]]
        ]

    def draw(self, index: int, language: Language) -> tuple[str, set[int]]:
        """A text for the image of row `index`, and the rows of the images that it is right for."""
        rng, row, forms = self.rng, self.rows[index], self.forms[language][index]
        form = forms[0] if rng.random() < 0.6 else rng.choice(forms)
        owners = self.named[plain(form)]
        keywords: list[str] = row[f"keywords_{language}"]
        kind = rng.random()
        if kind < 0.45 or not keywords:
            if rng.random() < 0.2:
                text = rng.choice(_TEMPLATES[language]).format(form)
            else:
                text = form if rng.random() < 0.85 else self._thin(form)
        elif kind < 0.55:
            parts = [form, *rng.sample(keywords, min(len(keywords), rng.randint(1, 3)))]
            text = self._join(parts)
        elif kind < 0.65:
            text, owners = caption(row["name_en"], row["name_zh"]), {index}
        else:
            chosen = rng.sample(keywords, min(len(keywords), rng.choice((1, 1, 1, 2, 3))))
            text = self._join(chosen)
            owners = set.intersection(*(self.described[plain(word)] for word in chosen))
        if plain(text) in self.forbidden:
            return forms[0], self.named[plain(forms[0])]
        return text, owners

    def _join(self, parts: list[str]) -> str:
        """The parts in random order, with a random one of the usual separators."""
        self.rng.shuffle(parts)
        return self.rng.choice((" ", ", ")).join(parts)

    def _thin(self, text: str) -> str:
        """The text without one of its words, if it has three or more."""
        words = text.split()
        if len(words) >= 3:
            words.pop(self.rng.randrange(len(words)))
        return " ".join(words)


def decode(images: list[bytes]) -> Tensor:
    """The images as float32 (n, 3, 64, 64), inverted: 0 is white and 1 is black."""
    pixels = [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images]
    return 1 - torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, 3, 64, 64) of `decode`, slightly changed at random, as the model takes them.

    They are shifted by up to a tenth of their side, scaled by 0.85 to 1.1, rotated by up to 8
    degrees, and their contrast is reduced to 0.85 to 1. A third of the images is not changed.
    """
    count = len(images)
    draws = torch.rand(count, 5, generator=generator) * 2 - 1
    draws[torch.rand(count, generator=generator) < 1 / 3] = 0
    angle = draws[:, 0] * math.radians(8)
    zoom = torch.where(draws[:, 1] < 0, 1 - 0.09 * -draws[:, 1], 1 + 0.18 * draws[:, 1])
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = torch.stack([cos, -sin, draws[:, 2] * 0.2, sin, cos, draws[:, 3] * 0.2], 1)
    grid = functional.affine_grid(rows.view(count, 2, 3), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    contrast = 1 - 0.15 * draws[:, 4].abs()
    return 1 - 2 * moved * contrast[:, None, None, None]


def encode_text(model: Any, tokens: list[list[int]]) -> Tensor:
    """Features of unit norm (n, d) of n texts, in their order.

    Texts of similar length go through the tower together, padded to the longest of them: with a
    causal mask, the padding after the end of text changes nothing.
    """
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    size = -(-len(order) // TEXT_CHUNKS)
    parts = []
    for start in range(0, len(order), size):
        chunk = [torch.tensor(tokens[index]) for index in order[start : start + size]]
        ids = nn.utils.rnn.pad_sequence(chunk, batch_first=True)
        length = ids.shape[1]
        hidden = model.token_embedding(ids) + model.positional_embedding[:length]
        hidden = model.transformer(hidden, attn_mask=model.attn_mask[:length, :length])
        ends = hidden[torch.arange(len(ids)), ids.argmax(1)]
        parts.append(model.ln_final(ends) @ model.text_projection)
    place = torch.empty(len(order), dtype=torch.long)
    place[torch.tensor(order)] = torch.arange(len(order))
    return functional.normalize(torch.cat(parts)[place], dim=1)


def contrastive_loss(images: Tensor, texts: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """The symmetric contrastive loss of one step, with several right answers.

    `images` (n, d) and `texts` (languages, n, d) have unit norm, `right` (languages, n, n) tells
    for which images of the step (last axis) a text is right, and `scale` is the logit scale. The
    target of a text is spread evenly over its right images. The target of an image is its own text;
    other texts that are right for it are left out.
    """
    logits = scale * texts @ images.T
    target = right / right.sum(2, keepdim=True)
    text_loss = functional.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))
    own = torch.eye(len(images), dtype=torch.bool)
    to_texts = logits.masked_fill(right & ~own, -torch.inf).transpose(1, 2)
    image_loss = functional.cross_entropy(to_texts.flatten(0, 1), torch.arange(len(images)).repeat(len(LANGUAGES)))
    return (text_loss + image_loss) / 2


def optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW, with weight decay for matrices but not for embeddings, gains and biases."""
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and "embedding" not in name
        (decayed if matrix else others).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, LEARNING_RATE, (0.9, 0.98), weight_decay=WEIGHT_DECAY)


def prepare(rows: list[dict[str, Any]], texts: Texts, folder: Path) -> tuple[Any, Tokenizer]:
    """Make the tokenizer and a model with random weights, and write both to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts.corpus(), LEARNED_TOKENS)
    config = model_config(tokenizer.get_vocab_size())
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tokenizer(tokenizer, folder)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    export(model, folder)
    return model, tokenizer


def train(folder: Path, steps: int, seed: int) -> None:
    """Train for `steps` steps and write the model to `folder`, which has the random model until then."""
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)  # denormal numbers are slow, and frequent where attention is sharp
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = load().to_pylist()
    texts = Texts(rows, rng)
    model, tokenizer = prepare(rows, texts, folder)
    pictures = decode([row["image"] for row in rows])
    adam = optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    logger.info("%d parameters, %d tokens", sum(p.numel() for p in model.parameters()), tokenizer.get_vocab_size())
    order: list[int] = []
    model.train()
    started = time.monotonic()
    for step in range(steps):
        if not order:
            order = rng.sample(range(len(rows)), len(rows))
        batch, order = order[:BATCH], order[BATCH:]
        drawn = [[texts.draw(index, language) for index in batch] for language in LANGUAGES]
        places = {row: place for place, row in enumerate(batch)}
        right = torch.zeros(len(LANGUAGES), len(batch), len(batch), dtype=torch.bool)
        for language, pairs in enumerate(drawn):
            for place, (_, owners) in enumerate(pairs):
                right[language, place, [places[owner] for owner in owners if owner in places]] = True
        encoded = tokenizer.encode_batch([text for pairs in drawn for text, _ in pairs])
        text_features = encode_text(model, [one.ids for one in encoded])
        index = torch.tensor(batch)
        image_features = model.encode_image(augment(pictures[index], generator), normalize=True)
        texts_of_step = text_features.view(*right.shape[:2], -1)
        loss = contrastive_loss(image_features, texts_of_step, right, model.logit_scale.exp())
        adam.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        if step % 20 == 0:
            logger.info(
                "step %d, %.0f s: loss %.4f, scale %.1f",
                step,
                time.monotonic() - started,
                loss.item(),
                model.logit_scale.exp().item(),
            )
    export(model, folder)
    logger.info("%d steps, %.0f s: %s", steps, time.monotonic() - started, report(evaluate(str(folder))))


def main() -> None:
    """Read the command line; train a model, or measure one."""
    parser = argparse.ArgumentParser(description="Train the demo's model, or measure one.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--output", type=Path, help="folder for the trained model")
    action.add_argument("--evaluate", metavar="FOLDER", help="folder of the model to measure")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    if arguments.evaluate is not None:
        print(report(evaluate(arguments.evaluate)).replace("  ", "\n"))
    else:
        train(arguments.output, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
