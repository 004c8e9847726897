"""`timm:NAME`: the features of a timm model before its classifier, preprocessed by its own data config; no text side.

NAME is a name of timm's, with or without a tag; `pretrained` is a checkpoint, or empty for the weights on the Hugging
Face hub. NAME may also be a folder, or a name on the hub, with timm's config.json.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from clip_batch.encoders import hub
from clip_batch.errors import EncoderError
from clip_batch.storage.store import file_digest
from clip_batch.types import EncoderSpec

if TYPE_CHECKING:
    from clip_batch.encoders.torch_encoder import TorchEncoder


def weights_digest(model: str, pretrained: str) -> str:
    """sha256 over the folder's configuration and weights, or over the name and the checkpoint."""
    name = model.removeprefix("timm:")
    if not pretrained:
        return hub.folder_digest(hub.folder(_repository(name)))
    if not os.path.isfile(pretrained):
        raise EncoderError(
            f"no checkpoint {pretrained}: give --pretrained its path, or leave it out to take timm's weights"
        )
    return hub.combine(["timm", name, file_digest(pretrained)])


def _repository(name: str) -> str:
    """The folder, or the name on the hub, with the weights of a model."""
    if os.path.isdir(name) or "/" in name:
        return name
    import timm

    try:
        settings = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except Exception as error:
        raise EncoderError(f"timm has no model {name!r} ({hub.line(error)}): timm.list_models() lists them") from None
    if not settings.hf_hub_id:
        raise EncoderError(f"timm has no weights of {name} on the hub: give --pretrained a checkpoint's path")
    name_on_hub = str(settings.hf_hub_id)
    return f"{name_on_hub}{settings.architecture}.{settings.tag}" if name_on_hub.endswith("/") else name_on_hub


def load(spec: EncoderSpec, device: str, compiled: int) -> TorchEncoder:
    """Load the model, as `Family.load` describes."""
    from clip_batch.encoders import preprocess
    from clip_batch.encoders.torch_encoder import TorchEncoder, place

    placement = place(spec, device, compiled)
    model, transform = load_model(spec.model, spec.pretrained)
    model = model.to(placement.device, placement.dtype)
    return TorchEncoder(
        model, model, None, preprocess.from_transform(transform, spec.preprocess, spec.exif_rotation), placement
    )


def load_model(model: str, pretrained: str) -> tuple[Any, Any]:
    """The model without its classifier, and its transform. EncoderError: timm cannot load it."""
    import timm
    from torchvision.transforms import Compose

    from clip_batch.encoders.transforms import to_rgb
    from clip_batch.encoders.undrawn import undrawn

    name, more = model.removeprefix("timm:"), {"pretrained_cfg_overlay": {"file": pretrained}} if pretrained else {}
    if not pretrained:
        name = f"local-dir:{hub.folder(_repository(name))}"
    try:
        create = partial(timm.create_model, name, pretrained=True, num_classes=0, **more)
        loaded = undrawn(create, lambda model: model).eval()
    except Exception as error:
        raise EncoderError(f"timm cannot load {model} {pretrained}: {hub.line(error)}") from None
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded), is_training=False)
    return loaded, Compose([to_rgb, *transform.transforms])
