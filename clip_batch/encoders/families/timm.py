"""`timm:NAME`: the features of a timm model before its classifier, by its own data config; no text side.

NAME is one of timm's, its tag too, with weights on the Hugging Face hub or in the checkpoint that `pretrained` names;
or a folder, or a name on the hub, that has timm's config.json.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from clip_batch.encoders import hub
from clip_batch.errors import EncoderError
from clip_batch.storage.store import file_digest
from clip_batch.types import EncoderSpec

if TYPE_CHECKING:
    from clip_batch.encoders.towers import TorchEncoder


def weights_digest(model: str, pretrained: str) -> str:
    """sha256 over the folder's configuration and weights, or over the name and the checkpoint. EncoderError."""
    name = model.removeprefix("timm:")
    if not pretrained:
        return hub.folder_digest(hub.folder(_repository(name)))
    if not os.path.isfile(pretrained):
        raise EncoderError(f"no checkpoint {pretrained}: give --pretrained its path, or leave it out for timm's own")
    return hub.combine(["timm", name, file_digest(pretrained)])


def _repository(name: str) -> str:
    """The folder, or the hub name, of a model's own weights."""
    if os.path.isdir(name) or "/" in name:
        return name
    import timm

    try:
        found = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except Exception as error:
        raise EncoderError(f"timm has no model {name!r} ({hub.line(error)}): timm.list_models() lists them") from None
    if not found.hf_hub_id:
        raise EncoderError(f"timm has no weights of {name} on the hub: give --pretrained a checkpoint's path")
    place = str(found.hf_hub_id)
    return f"{place}{found.architecture}.{found.tag}" if place.endswith("/") else place


def load(spec: EncoderSpec, device: str, compiled: int) -> TorchEncoder:
    """Load the model onto a device, compiled for batches of so many images (0: not); EncoderError if it cannot be."""
    from clip_batch.encoders import preprocess
    from clip_batch.encoders.towers import TorchEncoder, placed

    place = placed(spec, device, compiled)
    model, transform = read(spec.model, spec.pretrained)
    model, (steps, last) = model.to(*place), preprocess.split(transform)
    return TorchEncoder(
        spec, model, model, None, preprocess.preparing(spec.preprocess, steps, last), last, place, compiled
    )


def read(model: str, pretrained: str) -> tuple[Any, Any]:
    """The model without its classifier, and its transform. EncoderError."""
    import timm
    from torchvision.transforms import Compose

    from clip_batch.encoders import preprocess

    name, more = model.removeprefix("timm:"), {"pretrained_cfg_overlay": {"file": pretrained}} if pretrained else {}
    if not pretrained:
        name = f"local-dir:{hub.folder(_repository(name))}"
    try:
        made = timm.create_model(name, pretrained=True, num_classes=0, **more).eval()
    except Exception as error:
        raise EncoderError(f"timm cannot load {model} {pretrained}: {hub.line(error)}") from None
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(made), is_training=False)
    return made, Compose([preprocess.rgb, *transform.transforms])
