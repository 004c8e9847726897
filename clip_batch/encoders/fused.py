"""Parts of a model in the form that is fastest on a GPU, for a model that is compiled: the same weights and results.

On an H200 the three together take ViT-L/14 from .56 to .75 of the rate of a plain matrix product (docs/gpu.md).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

_ACTIVATIONS = {"c_fc": "gelu", "fc1": "act"}
"""The names of a block's first linear layer and of the activation after it: open_clip's and timm's."""

_ALIGNED = 8
"""Columns of which a GPU's fast products need a multiple."""


def fuse(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace, in place, what a model that computes in `dtype` has of parts for which there is a faster form."""
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, nn.Conv2d) and _cuts_patches(part):
                setattr(module, name, PatchProjection(part))
            elif type(part) is nn.MultiheadAttention and _attends_to_itself(module) and part.batch_first:
                setattr(module, name, SelfAttention(part))
            elif dtype != torch.float32 and type(part) is nn.Linear and part.bias is not None:
                activation = getattr(module, _ACTIVATIONS.get(name, ""), None)
                if type(activation) is nn.GELU:
                    setattr(module, name, LinearGelu(part))
                    setattr(module, _ACTIVATIONS[name], nn.Identity())


class SelfAttention(nn.Module):
    """An nn.MultiheadAttention of batch-first sequences with themselves.

    Torch's own puts the sequence first, and copies queries, keys and values.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Rows (n, length, width), and no weights, of a `query` that is its own key and value."""
        assert query is key and key is value and not need_weights
        count, length, width = query.shape
        projected = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
        parts = projected.view(count, length, 3, self.heads, width // self.heads).unbind(2)
        queries, keys, values = (part.transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask)
        return self.out_proj(mixed.transpose(1, 2).reshape(count, length, width)), None


class LinearGelu(nn.Module):
    """A linear layer and the GELU after it, which the product applies to its result while it has it.

    It is the GELU with the hyperbolic tangent: in half precision, rounding hides the difference (docs/gpu.md).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (..., out) of rows (..., in)."""
        flat = torch._addmm_activation(self.bias, rows.flatten(0, -2), self.weight.t(), use_gelu=True)
        return flat.view(*rows.shape[:-1], -1)


class PatchProjection(nn.Module):
    """A convolution whose patches do not overlap, as one product; cuDNN takes a multiple of the time."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.flat: torch.Tensor
        columns = self.weight[0].numel()
        padded = functional.pad(self.weight.detach().flatten(1), (0, -columns % _ALIGNED))
        self.register_buffer("flat", padded, persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The convolution's result (n, width, rows, columns), of pixels (n, 3, h, w)."""
        high, wide = self.weight.shape[2:]
        rows, columns = pixels.shape[2] // high, pixels.shape[3] // wide
        whole = pixels[:, :, : rows * high, : columns * wide].reshape(-1, 3, rows, high, columns, wide)
        patches = whole.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        patches = functional.pad(patches, (0, self.flat.shape[1] - patches.shape[2]))
        projected = functional.linear(patches, self.flat, self.bias).transpose(1, 2)
        return projected.view(len(pixels), -1, rows, columns)


def _cuts_patches(part: nn.Conv2d) -> bool:
    """Whether a convolution cuts pixels into patches."""
    return (
        part.in_channels == 3
        and part.kernel_size == part.stride
        and part.kernel_size != (1, 1)
        and part.padding in ((0, 0), "valid")
        and part.dilation == (1, 1)
        and part.groups == 1
    )


def _attends_to_itself(block: nn.Module) -> bool:
    """Whether a block is open_clip's ordinary one, which asks its attention for nothing else."""
    return type(block).__name__ == "ResidualAttentionBlock" and not hasattr(block, "ln_1_kv")
