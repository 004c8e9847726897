"""Captions cut to their length: no token of a causal text tower sees the padding behind it."""

from __future__ import annotations

import copy
from typing import Any

STEP = 8
"""Lengths are rounded up to it, so that a model of 77 tokens meets ten shapes and no more."""

CHUNK = 64
"""Captions of like length that are encoded together."""


class TextTower:
    """The text side of an open_clip model, run at the length its captions need; any other model as it is.

    Exact where each token sees only those before it and the vector is the end-of-text token's: CLIP
    and CustomTextCLIP with open_clip's own tower, not CoCa, SigLIP or Hugging Face towers.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._short: dict[int, Any] = {}
        self._pooling = _pooling(model)

    def __call__(self, tokens: Any) -> Any:
        """Rows (n, d) of token ids (n, context), on the model's device."""
        import torch

        if self._pooling is None:
            return self._model.encode_text(tokens)
        lengths = _lengths(tokens, *self._pooling)
        order = lengths.argsort(descending=True)
        rows = [self._encode(tokens[chunk], int(lengths[chunk[0]])) for chunk in order.split(CHUNK)]
        return torch.cat(rows)[order.argsort()]

    def _encode(self, tokens: Any, length: int) -> Any:
        length = min(-(-length // STEP) * STEP, tokens.shape[1])
        if length not in self._short:
            self._short[length] = _shortened(self._model, length)
        return self._short[length].encode_text(tokens[:, :length])


def _pooling(model: Any) -> tuple[str, int] | None:
    """How a causal tower picks its vector's token, and the end-of-text id; None for any other tower."""
    from open_clip.model import CLIP, CustomTextCLIP
    from open_clip.transformer import TextTransformer

    if type(model) is CLIP and model.attn_mask is not None:
        found = model.text_pool_type, model.text_eos_id
    elif type(model) is CustomTextCLIP and type(tower := model.text) is TextTransformer:
        found = tower.pool_type if tower.attn_mask is not None and tower.cls_emb is None else "", tower.eos_id
    else:
        return None
    return found if found[0] in ("argmax", "eos") else None


def _lengths(tokens: Any, kind: str, end: int) -> Any:
    """Tokens (n,) up to and with the one that is pooled: the highest id, or the first end-of-text."""
    return (tokens if kind == "argmax" else (tokens == end).int()).argmax(dim=-1) + 1


def _shortened(model: Any, length: int) -> Any:
    """The model for captions of `length` tokens: another object with the same weights, none copied."""
    import torch

    short = copy.copy(model)
    if hasattr(model, "text"):
        short._modules = {**model._modules, "text": _shortened(model.text, length)}
        return short
    positions = torch.nn.Parameter(model.positional_embedding[:length], requires_grad=False)
    short._parameters = {**model._parameters, "positional_embedding": positions}
    short._buffers = {**model._buffers, "attn_mask": model.attn_mask[:length, :length]}
    return short
