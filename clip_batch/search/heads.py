"""Heads: small linear or multi-layer models over the hits' vectors, for beauty, safety and violence.

A head is named as FILE_OR_URL#key=value&...:

    sha256       of the file; needed for a URL
    activation   relu (default) or linear, between layers
    before_last  relu or linear, before the last layer, where that is not as between the others
    output       sigmoid or linear, of the last layer; sigmoid for safety and violence, linear for aesthetic

An .npy of (m, d) is one layer without bias. An .npz, .safetensors, .pt or .pth holds `<layer>.weight`
(out, in) and `<layer>.bias` (out,). Of two outputs the second's probability counts. An aesthetic .npy of
three rows or more holds a vector for each rating, the worst first, which is added to the query.
"""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt

from clip_batch.errors import ConfigError
from clip_batch.storage.paths import is_local
from clip_batch.storage.store import read_url

if TYPE_CHECKING:
    from clip_batch.config import SearchConfig, ServeConfig, StorageConfig

Array = npt.NDArray[np.float32]

_KEYS = {
    "sha256": None,
    "activation": ("relu", "linear"),
    "before_last": ("relu", "linear"),
    "output": ("sigmoid", "linear"),
}

LIMIT = 0.5
"""The probability above which a hit is unsafe, or violent."""


@dataclass(frozen=True)
class Head:
    """Layers (weight (out, in), bias (out,)) with an activation between them, perhaps another one before the last."""

    layers: tuple[tuple[Array, Array], ...]
    activation: str
    before_last: str
    output: str

    @property
    def dim(self) -> int:
        """The dimension of the vectors that it judges."""
        return int(self.layers[0][0].shape[1])

    def __call__(self, vectors: Array) -> Array:
        """A value (n,) for each unit vector (n, d)."""
        values = vectors
        last = len(self.layers) - 1
        for number, (weight, bias) in enumerate(self.layers):
            if number and (self.before_last if number == last else self.activation) == "relu":
                values = np.maximum(values, 0)
            values = values @ weight.T + bias
        if values.shape[1] == 2:
            return _sigmoid(values[:, 1] - values[:, 0])
        return _sigmoid(values[:, 0]) if self.output == "sigmoid" else values[:, 0]


def _sigmoid(values: Array) -> Array:
    probabilities: npt.NDArray[Any] = 1 / (1 + np.exp(-np.clip(values, -80, 80)))
    return probabilities


@dataclass(frozen=True)
class Heads:
    """The heads that a search may use. `ratings` (m, d) are aesthetic vectors, the worst first."""

    aesthetic: Head | None = None
    ratings: Array | None = None
    safety: Head | None = None
    violence: Head | None = None

    @property
    def beauty(self) -> bool:
        """Whether an aesthetic weight means anything."""
        return self.aesthetic is not None or self.ratings is not None


def load_heads(config: SearchConfig | ServeConfig, storage: StorageConfig) -> Heads:
    """The heads that the options name. ConfigError: one cannot be read, or is not understood."""
    options = storage.storage_options
    ratings = aesthetic = None
    if config.aesthetic_head:
        head = load_head(config.aesthetic_head, "linear", options)
        weight = head.layers[0][0]
        if len(head.layers) == 1 and len(weight) > 2:
            ratings = weight
        else:
            aesthetic = head
    safety = load_head(config.safety_head, "sigmoid", options) if config.safety_head else None
    violence = load_head(config.violence_head, "sigmoid", options) if config.violence_head else None
    return Heads(aesthetic, ratings, safety, violence)


def load_head(spec: str, output: str, options: dict[str, Any] | None = None) -> Head:
    """The head of a FILE_OR_URL#key=value&...; `output` where it names none. ConfigError as `load_heads`."""
    url, _, fragment = spec.partition("#")
    settings = dict(parse_qsl(fragment))
    for key, value in settings.items():
        if key not in _KEYS or value not in (_KEYS[key] or (value,)):
            raise ConfigError(f"head {spec}: {key}={value} is not understood; there are {', '.join(_KEYS)}")
    try:
        data = read_url(url, options)
    except (OSError, ImportError) as error:
        raise ConfigError(f"head {url} cannot be read: {' '.join(str(error).split())}") from None
    digest, expected = hashlib.sha256(data).hexdigest(), settings.get("sha256")
    if expected is None and not is_local(url):
        raise ConfigError(f"head {url} needs #sha256=...: the file there now has {digest}")
    if expected not in (None, digest):
        raise ConfigError(f"head {url} has sha256 {digest}, not {expected}: put the right file there")
    try:
        layers = _layers(_arrays(url, data))
    except Exception as error:  # pickles, zips and headers fail in many ways
        raise ConfigError(f"head {url} is not understood: {' '.join(str(error).split())[:200]}") from None
    activation = settings.get("activation", "relu")
    return Head(layers, activation, settings.get("before_last", activation), settings.get("output", output))


def _arrays(url: str, data: bytes) -> dict[str, Any]:
    kind = url.rpartition(".")[2].lower()
    if kind == "npy":
        return {"weight": np.load(io.BytesIO(data), allow_pickle=False)}
    if kind == "npz":
        return dict(np.load(io.BytesIO(data), allow_pickle=False))
    if kind == "safetensors":
        import safetensors.numpy

        return dict(safetensors.numpy.load(data))
    if kind in ("pt", "pth"):
        import torch

        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in tensors.items()}
    raise ValueError("name a file that ends in .npy, .npz, .safetensors, .pt or .pth")


def _layers(arrays: dict[str, Any]) -> tuple[tuple[Array, Array], ...]:
    def order(name: str) -> list[Any]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    layers: list[tuple[Array, Array]] = []
    for name in sorted((name for name in arrays if name.endswith("weight")), key=order):
        weight = np.asarray(arrays[name], np.float32)
        if weight.ndim != 2:
            raise ValueError(f"{name} has {weight.ndim} dimensions; only linear layers are known")
        if layers and weight.shape[1] != len(layers[-1][1]):
            raise ValueError(f"{name} takes {weight.shape[1]} values, the layer before gives {len(layers[-1][1])}")
        bias = arrays.get(name.removesuffix("weight") + "bias", np.zeros(len(weight)))
        layers.append((weight, np.asarray(bias, np.float32).reshape(len(weight))))
    if not layers or not all(np.isfinite(part).all() for layer in layers for part in layer):
        raise ValueError("it has no weights, or weights that are not finite")
    return tuple(layers)
