"""A model whose random weights are not drawn has every number of one that is created plainly, or is drawn after all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def everything(model: Any) -> dict[str, Any]:
    """Parameters and buffers by name, also those that no checkpoint holds."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def same(one: Any, other: Any) -> bool:
    import torch

    ours, theirs = everything(one), everything(other)
    return list(ours) == list(theirs) and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def clip(folder: Path, name: str) -> Callable[[], Any]:
    import open_clip
    import torch

    torch.manual_seed(3)
    torch.save(open_clip.create_model(name).state_dict(), folder / "clip.pt")
    return partial(open_clip.create_model, name, pretrained=str(folder / "clip.pt"), precision="bf16")


def images(folder: Path, name: str) -> Callable[[], Any]:
    import timm
    import torch

    torch.manual_seed(3)
    torch.save(timm.create_model(name).state_dict(), folder / "timm.pth")
    overlay = {"file": str(folder / "timm.pth")}
    return partial(timm.create_model, name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize(
    ("saved", "name"), [(clip, "RN50"), (clip, "ViT-B-32"), (images, "test_vit"), (images, "test_resnet")]
)
def test_every_number_is_the_checkpoints(saved: Any, name: str, tmp_path: Path) -> None:
    from clip_batch.encoders.undrawn import undrawn

    create = saved(tmp_path, name)
    created: list[Any] = []

    def counted() -> Any:
        created.append(create())
        return created[-1]

    found = undrawn(counted, lambda model: model)
    assert len(created) == 1, "the model was created twice"
    assert same(found, create())


def test_the_demos_model_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip
    import torch

    from clip_batch.encoders.embedded import model_path
    from clip_batch.encoders.families.open_clip import load_model

    plain = open_clip.create_model(f"local-dir:{model_path()}")
    drawn: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor, *more: drawn.append(tensor.shape))
    model, _, _ = load_model(f"local-dir:{model_path()}", "", "fp32", torch.device("cpu"))
    assert same(model, plain) and not drawn


@pytest.mark.parametrize("left", ["weight", "derived"])
def test_what_a_checkpoint_lacks_is_drawn(left: str) -> None:
    import torch
    from torch import nn

    from clip_batch.encoders.undrawn import undrawn

    class Derived(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale: torch.Tensor
            self.register_buffer("scale", nn.init.trunc_normal_(torch.empty(7)) * 2, persistent=False)

    def create() -> nn.Module:
        made: nn.Module = nn.Linear(3, 5) if left == "weight" else Derived()
        made.load_state_dict({"bias": torch.ones(5)}, strict=False)
        return made

    torch.manual_seed(5)
    found = undrawn(create, lambda model: model)
    torch.manual_seed(5)
    assert same(found, create()), "it is not what the model is without the checkpoint"
