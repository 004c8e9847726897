"""The models and tags of open_clip, read from its files without importing it, which takes seconds.

open_clip keeps its tags as literals in pretrained.py and the settings of its models as JSON. Where a later version of
it does otherwise, it is imported.
"""

from __future__ import annotations
import __future__

import ast
import copy
import importlib.util
import json
import os
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from clip_batch.errors import EncoderError

DEFAULT_MODEL = "ViT-B-32"
"""What `--model auto` stands for."""

DEFAULT_TAGS = {
    "RN50": "openai",
    "RN50-quickgelu": "openai",
    "RN101": "openai",
    "RN101-quickgelu": "openai",
    "ViT-B-32": "datacomp_xl_s13b_b90k",
    "ViT-B-32-quickgelu": "openai",
    "ViT-B-16": "datacomp_xl_s13b_b90k",
    "ViT-B-16-quickgelu": "openai",
    "ViT-B-16-plus-240": "laion400m_e32",
    "ViT-L-14": "datacomp_xl_s13b_b90k",
    "ViT-L-14-quickgelu": "openai",
    "ViT-H-14": "laion2b_s32b_b79k",
    "ViT-H-14-quickgelu": "dfn5b",
    "ViT-g-14": "laion2b_s34b_b88k",
    "ViT-bigG-14": "laion2b_s39b_b160k",
    "convnext_base_w": "laion2b_s13b_b82k_augreg",
    "convnext_base_w_320": "laion_aesthetic_s13b_b82k_augreg",
    "convnext_large_d_320": "laion2b_s29b_b131k_ft_soup",
    "convnext_xxlarge": "laion2b_s34b_b82k_augreg_soup",
    "coca_ViT-B-32": "laion2b_s13b_b90k",
    "coca_ViT-L-14": "laion2b_s13b_b90k",
    "ViT-H-14-CLIPA-336": "datacomp1b",
    "nllb-clip-base-siglip": "v1",
    "nllb-clip-large-siglip": "v1",
    "MobileCLIP-B": "datacompdr_lt",
}
"""The default tags of models that have several; a model with one tag has that. docs/models.md says why these."""

GFLOP = Path(__file__).with_name("open_clip_gflop.json")
"""Billions of operations that each model's image tower does for an image; `python -m docs.gflop` counts them."""

NEAREST = 3
"""Names that a refusal suggests."""

Tags = dict[str, dict[str, Any]]
"""The settings of a model's tags, by tag, as `open_clip.get_pretrained_cfg` returns them."""


class _Names(NamedTuple):
    tags: dict[str, Tags]
    models: dict[str, dict[str, Any]]


def tags(model: str) -> Tags:
    """The tags of a model with the settings of each; {} for an unknown model. ModuleNotFoundError: no open_clip."""
    return _names().tags.get(model, {})


def models() -> dict[str, dict[str, Any]]:
    """The settings of each model, by name. ModuleNotFoundError: open_clip is not installed."""
    return _names().models


def default_tag(model: str) -> str:
    """The tag that a model has where none is given; "" where it has none, or several of which none is our default."""
    known = list(tags(model))
    return known[0] if len(known) == 1 else next((tag for tag in known if tag == DEFAULT_TAGS.get(model)), "")


def settings(model: str, tag: str) -> dict[str, Any]:
    """The settings of one tag of a model. EncoderError: there is no such model or tag; it names the nearest."""
    if model not in models():
        raise EncoderError(f"open_clip has no model {model!r}: {_advice(model, list(models()))}")
    known = tags(model)
    if found := known.get(tag.lower().replace("-", "_")) if tag else None:
        return found
    what = f"{tag!r} is neither a file nor a tag of {model}" if tag else f"model {model} needs weights"
    if not known:
        raise EncoderError(f"{what}: give --pretrained a checkpoint's path, as open_clip has no weights of it")
    raise EncoderError(f"{what}: {_advice(tag, list(known), '--pretrained ', model)}")


def _advice(name: str, known: list[str], flag: str = "--model ", words: str = "") -> str:
    """The names that are nearest to one, and the command that lists all."""
    near = sorted(known, key=lambda other: -SequenceMatcher(None, name.lower(), other.lower()).ratio())[:NEAREST]
    command = f"clip-batch models {words}".strip()
    which = "the nearest are" if name else "there are"
    return f"{which} {flag}{', '.join(near)}; {command} lists all, and a checkpoint's path is taken too"


@cache
def _names() -> _Names:
    found = importlib.util.find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
    folder = found.submodule_search_locations[0]
    try:
        return _Names(_read_tags(folder), _read_models(os.path.join(folder, "model_configs")))
    except Exception:  # its files are not what they were
        import open_clip

        names = open_clip.list_models()
        known: dict[str, Tags] = {name: {} for name in names}
        for name, tag in open_clip.list_pretrained():
            known.setdefault(name, {})[tag] = open_clip.get_pretrained_cfg(name, tag)
        return _Names(known, {name: open_clip.get_model_config(name) for name in names})


def _read_tags(folder: str) -> dict[str, Tags]:
    """The tags in pretrained.py: its assignments and the functions that make settings are run, its imports are not."""
    scope: dict[str, Any] = {"copy": copy}
    with open(os.path.join(folder, "constants.py"), encoding="utf-8") as file:
        exec(compile(file.read(), file.name, "exec"), scope)
    with open(os.path.join(folder, "pretrained.py"), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    kinds = (ast.Assign, ast.FunctionDef, ast.For, ast.Expr)
    tree.body = [node for node in tree.body if isinstance(node, kinds)]
    exec(compile(tree, file.name, "exec", flags=__future__.annotations.compiler_flag), scope)
    found: dict[str, Tags] = scope["_PRETRAINED"]
    return found


def _read_models(folder: str) -> dict[str, dict[str, Any]]:
    """The settings in the JSON files of a folder; those of models alone, as open_clip knows them."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".json"):
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                content = json.load(file)
            if all(part in content for part in ("embed_dim", "vision_cfg", "text_cfg")):
                found[name.removesuffix(".json")] = content
    return found
