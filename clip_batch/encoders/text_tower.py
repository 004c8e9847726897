"""Runs the text side of an open_clip model at the length that its captions need.

In a causal tower no token sees the padding after it, so padding can be left out.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_batch.encoders.replay import Pass

STEP = 8
"""Lengths are rounded up to a multiple of this, so that a model of 77 tokens sees only ten shapes."""

CHUNK = {"cpu": 64, "cuda": 256}
"""Captions of similar length that are encoded together, by device: a GPU is slow with few."""


class TrimmedTextTower:
    """The text side of an open_clip model, run at the length that its captions need if that is exact.

    It is exact where each token sees only those before it and the vector is the end-of-text token's: in CLIP and
    CustomTextCLIP with open_clip's own tower, but not in CoCa, SigLIP or towers of Hugging Face. Those run unchanged.
    With `recorded`, a GPU replays chunks, of which there are few shapes.
    """

    def __init__(self, model: Any, recorded: bool = False) -> None:
        self._model, self._device = model, next(model.parameters()).device
        self._trimmed: dict[int, Any] = {}
        self._pooling = _pooling(model)
        self._chunk = CHUNK.get(self._device.type, CHUNK["cpu"])
        self._replay: Pass | None = None
        if recorded and self._device.type == "cuda":
            from clip_batch.encoders.replay import Replay

            self._replay = Replay(self._run, self._device)

    def __call__(self, tokens: Any) -> Any:
        """Rows (n, d), on the model's device, of token ids (n, context) on the host."""
        import torch

        if self._pooling is None:
            return self._model.encode_text(tokens.to(self._device))
        # Lengths are taken on the host: a GPU would be waited for.
        lengths = _lengths(tokens, *self._pooling)
        order = lengths.argsort(descending=True)
        longest = lengths[order].tolist()
        tokens = tokens[order]
        chunks = max(1, -(-len(tokens) // self._chunk))
        size = -(-len(tokens) // chunks)  # all nearly equal: a GPU is slow with few
        rows = [self._encode(tokens[at : at + size], longest[at]) for at in range(0, len(tokens), size)]
        return torch.cat(rows)[order.argsort().to(self._device)]

    def _encode(self, tokens: Any, length: int) -> Any:
        """Rows of a chunk of tokens on the host, the longest of which has this length."""
        count = len(tokens)
        tokens = tokens[:, : -(-length // STEP) * STEP]
        if self._replay is None or 2 * count < self._chunk:
            return self._run(tokens.to(self._device))
        # All chunks have one size: padding with captions that are there costs less than recording many shapes.
        return self._replay(tokens[[number % count for number in range(self._chunk)]])[:count]

    def _run(self, tokens: Any) -> Any:
        length = tokens.shape[1]
        if length not in self._trimmed:
            self._trimmed[length] = _trim(self._model, length)
        return self._trimmed[length].encode_text(tokens)


def _pooling(model: Any) -> tuple[str, int] | None:
    """How a causal tower picks the token of its vector, and the id of end-of-text; None for any other tower."""
    from open_clip.model import CLIP, CustomTextCLIP
    from open_clip.transformer import TextTransformer

    if type(model) is CLIP and model.attn_mask is not None:
        pooling = model.text_pool_type, model.text_eos_id
    elif type(model) is CustomTextCLIP and type(tower := model.text) is TextTransformer:
        pooling = tower.pool_type if tower.attn_mask is not None and tower.cls_emb is None else "", tower.eos_id
    else:
        return None
    return pooling if pooling[0] in ("argmax", "eos") else None


def _lengths(tokens: Any, pool_type: str, end: int) -> Any:
    """Tokens (n,) up to and including the pooled one: the highest id, or the first end-of-text."""
    return (tokens if pool_type == "argmax" else (tokens == end).int()).argmax(dim=-1) + 1


def _trim(model: Any, length: int) -> Any:
    """The model for captions of `length` tokens: a new object that shares all weights."""
    import torch

    trimmed = copy.copy(model)
    if hasattr(model, "text"):
        trimmed._modules = {**model._modules, "text": _trim(model.text, length)}
        return trimmed
    positions = torch.nn.Parameter(model.positional_embedding[:length], requires_grad=False)
    trimmed._parameters = {**model._parameters, "positional_embedding": positions}
    trimmed._buffers = {**model._buffers, "attn_mask": model.attn_mask[:length, :length]}
    return trimmed
