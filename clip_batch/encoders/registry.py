"""Finds the family of a model by its name: `resolve` gives a model's identity, `load` gives its encoder.

A family is a module with `weights_digest` and `load`. `FAMILIES` lists ours; other distributions register theirs by
an entry point (see docs/models.md).
"""

from __future__ import annotations

import io
import os
from dataclasses import replace
from importlib import import_module
from typing import Any, Protocol

from clip_batch.encoders import hub, open_clip_names
from clip_batch.encoders.embedded import model_path
from clip_batch.encoders.encoder import Model
from clip_batch.errors import EncoderError, InputError
from clip_batch.storage.cache import local_copy
from clip_batch.storage.paths import is_local, local_path
from clip_batch.types import EncoderSpec


class OtherWeights(EncoderError):
    """The weights found are not those of the spec."""


class Family(Protocol):
    """What a family's module has. Both functions raise EncoderError; a model may be a local path."""

    def weights_digest(self, model: str, pretrained: str) -> str:
        """sha256 over everything that decides a vector: weights, configuration, tokenizer, preprocessing.

        It does not load a local model. It may download files, unless `hub.offline` is active.
        """

    def load(self, spec: EncoderSpec, device: str, compiled: int) -> Model:
        """The encoder; `device` and `compiled` are as `clip_batch.encoders.load` takes them."""


_OPEN_CLIP = "clip_batch.encoders.families.open_clip"

FAMILIES = {
    "fake": "clip_batch.encoders.families.fake",
    "hf-hub": _OPEN_CLIP,
    "local-dir": _OPEN_CLIP,
    "hf": "clip_batch.encoders.families.hf",
    "timm": "clip_batch.encoders.families.timm",
    "cn-clip": "clip_batch.encoders.families.cn_clip",
    "mclip": "clip_batch.encoders.families.mclip",
    "onnx": "clip_batch.encoders.families.onnx",
    "openvino": "clip_batch.encoders.families.onnx",
}
"""The module of each family, by the prefix before the colon in a model's name; a name without one is open_clip's."""

ENTRY_POINTS = "clip_batch.encoders"
"""The group of entry points by which other distributions register families: prefix = module."""


def resolve(
    model: str,
    pretrained: str = "",
    preprocess: str = "exact",
    precision: str = "fp32",
    options: dict[str, Any] | None = None,
    exif_rotation: bool = False,
) -> EncoderSpec:
    """The identity of a model, with the digest of its weights; a local model is not loaded, others may be downloaded.

    `pretrained` is a tag, a path, or a URL that is opened with storage `options`; a name of open_clip without one gets
    its default tag, and "auto" is the default model. EncoderError: the weights cannot be found.
    """
    if model == "auto":
        model = open_clip_names.DEFAULT_MODEL
    if model == "demo" and pretrained:
        raise EncoderError(f"demo has its own weights: leave out --pretrained {pretrained}")
    prefix, colon, name = model.partition(":")
    if not (colon or pretrained) and model != "demo":
        pretrained = open_clip_names.default_tag(model.replace("/", "-"))
    for folder in (name, name.partition("+")[0]):  # absolute, so that a plan can be read from any working directory
        if os.path.isdir(folder):
            model = f"{prefix}:{os.path.abspath(folder)}{name.removeprefix(folder)}"
            break
    if os.path.isfile(pretrained):
        pretrained = os.path.abspath(pretrained)
    located = locate_model(model)
    weights = _family(located).weights_digest(located, _local_weights(pretrained, options))
    return EncoderSpec(model, pretrained, weights, preprocess, precision, exif_rotation)


def load(
    spec: EncoderSpec,
    device: str = "auto",
    options: dict[str, Any] | None = None,
    compiled: int = 0,
    *,
    check: bool = True,
) -> Model:
    """The encoder of a spec, loaded offline. EncoderError: its weights are not the spec's, or it does
    not turn images upright though the spec says so.

    `device` is auto (cuda if there is a GPU), cpu, cuda or cuda:N. Storage `options` are for weights at a URL.
    The image side is compiled for batches of `compiled` images; 0 does not compile it. Without `check` the weights are
    not compared with the spec's, for which they are read as a whole.
    """
    located = replace(spec, model=locate_model(spec.model), pretrained=_local_weights(spec.pretrained, options))
    with hub.offline():
        if check:
            check_weights(_family(located.model).weights_digest(located.model, located.pretrained), spec)
        encoder = _family(located.model).load(located, device, compiled)
    if spec.exif_rotation and not _turns(encoder):
        raise EncoderError(f"{spec.model} does not apply EXIF orientation: plan with --exif-rotation ignore")
    return encoder


def _turns(encoder: Model) -> bool:
    """Whether an encoder applies EXIF orientation; those of other distributions may not."""
    from PIL import Image

    from clip_batch.samples.metadata import ORIENTATION

    exif = Image.Exif()
    exif[ORIENTATION] = 3  # upside down
    files = [io.BytesIO(), io.BytesIO()]
    for file, options in zip(files, ({}, {"exif": exif.tobytes()}), strict=True):
        Image.linear_gradient("L").save(file, "PNG", **options)
    plain, turned = (encoder.preprocess(file.getvalue(), 2**16) for file in files)
    return bool((plain != turned).any())


def check_weights(digest: str, planned: EncoderSpec) -> None:
    """OtherWeights if the digest of some weights is not the planned one."""
    if digest != planned.weights:
        name = f"{planned.model} {planned.pretrained}".strip()
        raise OtherWeights(
            f"the weights of {name} are {digest[:12]} here, planned were "
            f"{planned.weights[:12]}: put the planned weights back, or plan into another output"
        )


def _family(model: str) -> Family:
    """The module of a model's family. EncoderError: no family has that prefix."""
    prefix, colon, _ = model.partition(":")
    module = FAMILIES.get(prefix) if colon else _OPEN_CLIP
    if module is None:
        from importlib.metadata import entry_points

        module = next((entry.value for entry in entry_points(group=ENTRY_POINTS) if entry.name == prefix), None)
    if module is None:
        raise EncoderError(f"no family of models is called {prefix!r}: there are {', '.join(FAMILIES)}")
    family: Family = import_module(module)
    return family


def locate_model(model: str) -> str:
    """The model, with `demo` replaced by the path of the embedded model in this installation."""
    return f"local-dir:{model_path()}" if model == "demo" else model


def _local_weights(pretrained: str, options: dict[str, Any] | None) -> str:
    """A local copy of a checkpoint at a URL, from this machine's cache; any other value as it is."""
    if "://" not in pretrained or is_local(pretrained):
        return local_path(pretrained)
    try:
        return local_copy(pretrained, options)
    except (InputError, OSError) as error:
        raise EncoderError(f"the weights cannot be found: {error}") from None
