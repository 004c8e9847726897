"""Compiles the blocks of which a model is stacked with torch's inductor, for a GPU: all share the code of the first.

This takes seconds, and the model is then as fast as one that was compiled as a whole, which takes a minute.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from clip_batch.encoders.encoder import CannotCompile
from clip_batch.encoders.fused import fuse
from clip_batch.errors import one_line

Tower = Callable[[torch.Tensor], torch.Tensor]

Stack = nn.ModuleList | nn.Sequential


def compile_tower(model: nn.Module, tower: Tower, blank: torch.Tensor) -> Tower:
    """The image tower of a model, from pixels (n, 3, h, w) to rows (n, d), for batches of any size n.

    The model is changed in place: parts that have a faster form are replaced, and its blocks compiled; a model without
    blocks is compiled as a whole. `blank` is a batch that is tried.
    CannotCompile: it cannot be compiled here.
    """
    fuse(model, blank.dtype)
    blocks = [block for stack in _stacks(model) for block in stack]
    for block in blocks:
        block.compile(dynamic=True)
    compiled: Tower = tower if blocks else torch.compile(tower, dynamic=True)
    try:
        with torch.inference_mode():
            compiled(blank)
    except Exception as error:  # torch's compiler raises errors of any class
        remedy = "install g++ and Python's headers, or give --no-compile"
        raise CannotCompile(f"torch cannot compile the image tower here ({one_line(error, 200)}): {remedy}") from None
    return compiled


def _stacks(model: nn.Module) -> list[Stack]:
    """The innermost lists of several blocks of one class that have parts themselves: the layers of a model."""
    found = [
        module
        for module in model.modules()
        if isinstance(module, Stack)
        and len(module) > 1
        and len({type(block) for block in module}) == 1
        and any(True for _ in module[0].children())
    ]
    return [stack for stack in found if not any(inner is not stack and inner in found for inner in stack.modules())]
