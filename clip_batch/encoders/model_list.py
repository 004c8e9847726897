"""The list that `clip-batch models` shows: open_clip's models and tags, what each costs, and which are cached here."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from clip_batch.encoders import open_clip_names
from clip_batch.encoders.embedded import model_path
from clip_batch.errors import InputError

LICENCES = {
    r"laion/CLIP-(?!.*CommonPool)": "MIT or Apache-2.0",
    r"timm/[^/]*\.(openai|yfcc15m|cc12m)|timm/vit_[^/]*\.laion400m": "MIT or Apache-2.0",
    r"timm/[^/]*SigLIP|timm/PE-Core": "Apache-2.0",
    r"timm/[^/]*\.metaclip": "CC-BY-NC-4.0",
    r"apple/DFN": "Apple's own (apple-ascl)",
    r"apple/MobileCLIP|timm/MobileCLIP2": "Apple's own (apple-amlr)",
}
"""Licences by the beginnings of repositories, as patterns; that of a model card in the cache goes before these.

They are those that timm 1.0.31 records of the same weights, some of which it has in several forms. What it does not
record is not here.
"""


@dataclass(frozen=True)
class ModelRow:
    """One tag of a model.

    - `default`: whether the model has this tag where none is given.
    - `dim`: numbers of a vector; `image_size`: pixels of a side.
    - `gflop`: billions of operations for an image, two for a multiplication and its addition; None if not counted.
    - `licence`: of the weights; "" if we do not know it.
    - `source`: the repository on the Hugging Face hub, or the URL, of the weights.
    - `cached`: whether the weights are on this machine.
    """

    model: str
    tag: str
    default: bool
    dim: int
    image_size: int | list[int]
    gflop: float | None
    licence: str
    source: str
    cached: bool


def model_list(words: Sequence[str] = ()) -> list[ModelRow]:
    """The models with weights whose name, tag, licence or source has each of `words`, in upper or lower case.

    ModuleNotFoundError: open_clip is not installed. InputError: there is no such model.
    """
    rows = [row for row in _rows() if all(word.lower() in _text(row) for word in words)]
    if not rows:
        raise InputError(f"no model with weights has {' and '.join(words)} in its name: clip-batch models lists all")
    return rows


def describe(rows: Sequence[ModelRow]) -> str:
    """The rows as text: one line for a model, and one for each of its tags."""
    lines = []
    for model, group in groupby(rows, lambda row: row.model):
        tags = list(group)
        one = tags[0]
        cost = f", {one.gflop:g} GFLOP an image" if one.gflop is not None else ""
        lines.append(f"{model}: {one.dim} numbers, {one.image_size} pixels{cost}")
        for row in filter(lambda row: row.tag, tags):
            notes = ["default"] if row.default else []
            notes += ["cached here"] if row.cached else []
            notes += [row.licence or "licence: see its page"]
            lines.append(f"    {row.tag:<34} {', '.join(notes)} ({row.source})")
    return "\n".join(lines)


def _text(row: ModelRow) -> str:
    cached = "cached" if row.cached else ""
    return f"{row.model} {row.tag} {row.licence} {row.source} {cached}".lower()


def _rows() -> Iterator[ModelRow]:
    with open(os.path.join(model_path(), "open_clip_config.json"), encoding="utf-8") as file:
        demo = json.load(file)["model_cfg"]
    gflop = json.loads(open_clip_names.GFLOP.read_text())
    size = demo["vision_cfg"]["image_size"]
    yield ModelRow("demo", "", True, demo["embed_dim"], size, gflop["demo"], "Apache-2.0", "this package", True)
    cache = hub_cache()
    for model, settings in open_clip_names.models().items():
        default = open_clip_names.default_tag(model)
        size = settings["vision_cfg"].get("image_size", 224)
        for tag, weights in open_clip_names.tags(model).items():
            source = (weights.get("hf_hub") or weights.get("url", "")).rstrip("/")
            folders = _snapshots(cache, source)
            yield ModelRow(
                model,
                tag,
                tag == default,
                settings["embed_dim"],
                size,
                gflop.get(model),
                _licence(source, folders),
                source,
                _is_cached(source, folders),
            )


def hub_cache() -> str:
    """The folder of the Hugging Face hub's cache, as huggingface_hub finds it."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    return os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def _snapshots(cache: str, source: str) -> list[str]:
    """The cached snapshots of a repository."""
    repository = "--".join(source.split("/")[:2])
    return glob.glob(os.path.join(glob.escape(os.path.join(cache, f"models--{repository}")), "snapshots", "*"))


def _is_cached(source: str, snapshots: Sequence[str]) -> bool:
    """Whether the weights of a source are on this machine, where open_clip keeps them."""
    if source.startswith("https://"):
        return os.path.isfile(os.path.expanduser(f"~/.cache/clip/{source.rpartition('/')[2]}"))
    weights = (".safetensors", ".bin", ".pt", ".pth")
    return any(name.endswith(weights) for folder in snapshots for name in os.listdir(folder))


def _licence(source: str, snapshots: Sequence[str]) -> str:
    """The licence that a cached model card names, or the one that we know; "" without either."""
    for folder in snapshots:
        card: Any = os.path.join(folder, "README.md")
        if os.path.isfile(card):
            with open(card, encoding="utf-8", errors="replace") as file:
                if found := re.search(r"^license: *(\S+)", file.read(4096), re.MULTILINE):
                    return found[1]
    return next((name for start, name in LICENCES.items() if re.match(start, f"{source}/")), "")
