"""The image tower in fp8, with a scale for each row, beside the same in bf16: its rate, and the cosine of its rows.

The blocks are compiled one by one, so that a block is compiled once. Both towers have their attention's projections as
linear layers, which fp8 then covers. `own` calls torch's scaled product itself; `torchao` is that library's
conversion of the same layers, where it is installed.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tests.bench.gpu_parts import Part
from tests.bench.gpu_parts.encoder import created
from tests.bench.gpu_parts.timing import median_seconds

BATCH = 512

MOST = 448.0
"""The largest number of float8_e4m3fn."""


def run(part: Part) -> None:
    options = part.options
    if not options.cuda or options.model[0] == "demo":
        part.note("fp8: needs CUDA and a model of open_clip")
        return
    tower = created(options.model[0], options.device, "bf16").visual
    for block in tower.transformer.resblocks:
        block.attn = Attention(block.attn)
    torch.manual_seed(1)
    pixels = torch.randn(BATCH, 3, 224, 224, device=options.device, dtype=torch.bfloat16)
    with torch.inference_mode():
        exact = tower(pixels[:64]).float()
    found: dict[str, float] = {}
    for name, convert in (("bf16", lambda made: None), ("own", own), ("torchao", by_torchao)):
        part.attempt(f"fp8, {name}", 10, measure, part, name, convert, tower, pixels, exact, found)


def measure(
    part: Part,
    name: str,
    convert: Any,
    tower: nn.Module,
    pixels: torch.Tensor,
    exact: torch.Tensor,
    found: dict[str, float],
) -> None:
    made: Any = copy.deepcopy(tower)
    started = time.perf_counter()
    convert(made)
    for block in made.transformer.resblocks:
        block.compile(dynamic=False)
    with torch.inference_mode():
        rows = made(pixels)[:64].float()
        torch.cuda.synchronize()
        ready = time.perf_counter() - started
        taken = median_seconds(lambda: made(pixels), part.options.device, 2.0)
    cosine = torch.nn.functional.cosine_similarity(rows, exact)
    what = f"{part.options.model[0]}, blocks compiled, {BATCH}: {name if name == 'bf16' else f'fp8 ({name})'}"
    part.row(name, what, "images/s", BATCH / taken, found.get("bf16"), "bf16")
    part.figure(name, {"ready_s": ready, "cosine_least": float(cosine.min()), "cosine_mean": float(cosine.mean())})
    part.note(f"{name}: the least cosine with bf16 eager is {cosine.min():.4f}")
    found[name] = BATCH / taken


class Attention(nn.Module):
    """open_clip's attention of an image tower, of two linear layers."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        self.inputs = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        self.inputs.weight, self.inputs.bias = weight, bias
        self.outputs = nn.Linear(weight.shape[1], weight.shape[1], device=weight.device, dtype=weight.dtype)
        self.outputs.weight, self.outputs.bias = attention.out_proj.weight, attention.out_proj.bias

    def forward(self, x: torch.Tensor, *others: Any, **options: Any) -> tuple[torch.Tensor]:
        parts = self.inputs(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return (self.outputs(mixed.transpose(1, 2).flatten(2)),)


def quantized(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in fp8, and the scale of each, float32 (n, 1)."""
    scale = rows.abs().amax(-1, keepdim=True).float().clamp_(min=1e-12) / MOST
    return (rows.float() / scale).to(torch.float8_e4m3fn), scale


class Float8Linear(nn.Module):
    """A linear layer in fp8, whose inputs are scaled by row as they come, and whose weights by output."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantized(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, scale = quantized(x.flatten(0, -2))
        scales = {"scale_a": scale, "scale_b": self.scale.t()}
        kind = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        done = torch._scaled_mm(rows, self.weight.t(), bias=self.bias, **scales, **kind)
        return done.unflatten(0, x.shape[:-1])


def own(tower: nn.Module) -> None:
    """Replace the linear layers of the blocks."""
    for module in list(tower.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, Float8Linear(layer))


def by_torchao(tower: nn.Module) -> None:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    def is_linear(layer: nn.Module, name: str) -> bool:
        return type(layer) is nn.Linear

    quantize_(tower, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=is_linear)
