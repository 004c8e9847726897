"""Heads: their layers and activations, and files that are not heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clip_batch.config import ServeConfig, StorageConfig
from clip_batch.errors import ConfigError
from clip_batch.search.heads import load_head, load_heads


def test_layers_of_a_head(tmp_path: Path) -> None:
    import torch
    from safetensors.numpy import save_file

    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    vectors = np.random.default_rng(2).standard_normal((5, 8)).astype(np.float32)
    right = torch.sigmoid(model(torch.from_numpy(vectors)))[:, 0].detach().numpy()
    torch.save(model.state_dict(), tmp_path / "head.pth")
    save_file({name: value.numpy() for name, value in model.state_dict().items()}, tmp_path / "head.safetensors")
    for name in ("head.pth", "head.safetensors"):
        np.testing.assert_allclose(load_head(str(tmp_path / name), "sigmoid")(vectors), right, atol=1e-6)
    straight = load_head(f"{tmp_path}/head.pth#activation=linear&output=linear", "sigmoid")
    by_hand = (vectors @ straight.layers[0][0].T + straight.layers[0][1]) @ straight.layers[1][0].T
    np.testing.assert_allclose(straight(vectors), (by_hand + straight.layers[1][1])[:, 0], atol=1e-5)


def test_a_head_without_activation_before_its_last_layer(tmp_path: Path) -> None:
    """Return a head like LAION's for ViT-H-14."""
    import torch

    linear, relu = torch.nn.Linear, torch.nn.ReLU()
    layers = [linear(8, 6), relu, linear(6, 5), relu, linear(5, 4), linear(4, 1)]
    model, with_relu = torch.nn.Sequential(*layers), torch.nn.Sequential(*layers[:-1], relu, layers[-1])
    vectors = np.random.default_rng(3).standard_normal((50, 8)).astype(np.float32)
    torch.save(model.state_dict(), tmp_path / "head.pth")
    for more, wanted in (("", with_relu), ("&before_last=relu", with_relu), ("&before_last=linear", model)):
        found = load_head(f"{tmp_path}/head.pth#output=linear{more}", "sigmoid")(vectors)
        right = wanted(torch.from_numpy(vectors))[:, 0].detach().numpy()
        np.testing.assert_allclose(found, right, atol=1e-6)
    assert np.abs(found - with_relu(torch.from_numpy(vectors))[:, 0].detach().numpy()).max() > 1e-3


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("{}/absent.npy", "cannot be read"),
        ("{}/h.npy#sha256=00", "has sha256"),
        ("{}/h.npy#colour=red", "colour=red is not understood"),
        ("{}/h.npy#activation=gelu", "activation=gelu is not understood"),
        ("{}/h.npy#before_last=none", "before_last=none is not understood; there are .*before_last"),
        ("memory://x/h.npy", "needs #sha256="),
        ("{}/h.bin", "name a file that ends in"),
        ("{}/pickle.npy", "not understood"),
        ("{}/cube.npy", "3 dimensions"),
        ("{}/nan.npy", "not finite"),
        ("{}/gap.npz", "the layer before gives"),
    ],
)
def test_a_head_that_is_none(tmp_path: Path, spec: str, text: str) -> None:
    import fsspec

    np.save(tmp_path / "h.npy", np.ones((1, 8)))
    (tmp_path / "h.bin").write_bytes(b"x")
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "cube.npy", np.ones((1, 2, 3)))
    np.save(tmp_path / "nan.npy", np.full((1, 8), np.nan))
    weights = {"0.weight": np.ones((2, 8)), "10.weight": np.ones((1, 3)), "10.bias": np.ones(1)}
    np.savez(tmp_path / "gap.npz", **weights)
    with fsspec.open("memory://x/h.npy", "wb") as file:
        file.write((tmp_path / "h.npy").read_bytes())
    with pytest.raises(ConfigError, match=text):
        load_heads(ServeConfig(safety_head=spec.format(tmp_path)), StorageConfig())
