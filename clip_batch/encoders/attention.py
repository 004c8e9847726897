"""Self-attention in operations that a compiler fuses, for models whose blocks hold torch's nn.MultiheadAttention."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class SelfAttention(nn.Module):
    """What an nn.MultiheadAttention computes of batch-first sequences with themselves, by the same weights.

    torch's own puts the sequence first, and copies queries, keys and values: in a compiled model a tenth of the time.
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


def replace_attention(model: nn.Module) -> None:
    """Replace, in place, the attention in open_clip's ordinary blocks by `SelfAttention`; others stay as they are."""
    from open_clip.transformer import ResidualAttentionBlock

    for block in model.modules():
        if type(block) is ResidualAttentionBlock and not hasattr(block, "ln_1_kv"):
            attention = block.attn
            if type(attention) is nn.MultiheadAttention and attention.batch_first:
                block.attn = SelfAttention(attention)
