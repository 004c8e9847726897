"""Models are created without the random weights that their checkpoint replaces: drawing them takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

Made = TypeVar("Made")

_DRAWS = frozenset((init.kaiming_uniform_, init.normal_, init.uniform_, torch.Tensor.normal_, torch.Tensor.uniform_))
"""What fills a tensor with random numbers, as torch shows it to a mode."""


class _NotNumbers(TorchFunctionMode):
    """In this thread, tensors are filled with NaN where they would be filled with random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in _DRAWS:
            return func(*args, **kwargs)
        tensor: torch.Tensor = args[0] if args else kwargs["tensor"]
        tensor.detach().fill_(torch.nan)
        return tensor


def undrawn(create: Callable[[], Made], model: Callable[[Made], torch.nn.Module]) -> Made:
    """What `create` makes, which loads a checkpoint into the `model` in it.

    Weights are NaN until the checkpoint replaces them. Where some still are, all is created once more with weights
    drawn at random, as if by `create` alone.
    """
    with _NotNumbers():
        made = create()
    loaded = model(made)
    if any(bool(each.isnan().any()) for each in chain(loaded.parameters(), loaded.buffers())):
        made = create()
    return made
