"""Compiled blocks and their attention give what the model gives uncompiled; this runs on the CPU what is for GPUs."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from clip_batch.errors import EncoderError

pytestmark = pytest.mark.slow


@pytest.fixture
def model() -> Any:
    """A small CLIP of random weights, with an image tower and a causal text tower of blocks."""
    import open_clip
    import torch

    torch.manual_seed(0)
    vision = {"layers": 3, "width": 128, "patch_size": 16, "image_size": 32}
    return open_clip.CLIP(32, vision, {"width": 64, "heads": 2, "layers": 3}).eval()


def test_attention_is_torchs_own_whatever_the_mask(model: Any) -> None:
    import open_clip
    import torch

    from clip_batch.encoders.fused import SelfAttention, fuse

    other = copy.deepcopy(model)
    fuse(other, torch.float32)
    assert sum(isinstance(part, SelfAttention) for part in other.modules()) == 6
    tokens = open_clip.get_tokenizer("RN50")(["a cat", "two dogs on a sofa", ""])
    pixels = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(other.encode_image(pixels), model.encode_image(pixels), rtol=0, atol=2e-6)
        torch.testing.assert_close(other.encode_text(tokens), model.encode_text(tokens), rtol=0, atol=2e-6)
    with pytest.raises(AssertionError):  # it is no attention to another sequence
        other.visual.transformer.resblocks[0].attn(pixels, pixels + 1, pixels)


def test_patches_are_the_convolutions(model: Any) -> None:
    import torch
    from torch import nn

    from clip_batch.encoders.fused import PatchProjection, fuse

    pixels = torch.randn(3, 3, 31, 44)  # the last rows and columns are no whole patch
    for side, bias, padding in ((14, True, 0), (7, False, "valid"), (16, True, 0)):
        stem = nn.Sequential(nn.Conv2d(3, 24, side, side, padding=padding, bias=bias))
        expected = stem(pixels)
        fuse(stem, torch.float32)
        assert type(stem[0]) is PatchProjection and stem[0].weight.shape == (24, 3, side, side)
        torch.testing.assert_close(stem(pixels), expected, rtol=0, atol=2e-6)
    for other in (nn.Conv2d(3, 8, 4, 2), nn.Conv2d(3, 8, 4, 4, padding=1), nn.Conv2d(4, 8, 4, 4)):
        stem = nn.Sequential(other)
        fuse(stem, torch.float32)
        assert stem[0] is other


def test_gelu_within_the_product_adds_nothing_to_the_error_of_half_precision(model: Any) -> None:
    import torch
    from torch.nn.functional import cosine_similarity

    from clip_batch.encoders.fused import LinearGelu, fuse

    pixels = torch.randn(32, 3, 32, 32)
    half, fused = copy.deepcopy(model).bfloat16(), copy.deepcopy(model).bfloat16()
    fuse(fused, torch.bfloat16)
    assert sum(isinstance(part, LinearGelu) for part in fused.modules()) == 6
    with torch.inference_mode():
        exact = model.encode_image(pixels)
        errors = [
            (1 - cosine_similarity(other.encode_image(pixels.bfloat16()).float(), exact)).mean()
            for other in (half, fused)
        ]
    assert errors[1] < 1.3 * errors[0] < 1e-3
    fuse(model, torch.float32)
    assert not any(isinstance(part, LinearGelu) for part in model.modules()), "fp32 would not be exact"


def test_blocks_are_compiled_once_for_all_sizes_of_a_batch(model: Any) -> None:
    import torch
    from torch._dynamo.utils import counters

    from clip_batch.encoders.inductor import compile_tower

    other = copy.deepcopy(model)
    counters.clear()
    tower = compile_tower(other, other.encode_image, torch.randn(2, 3, 32, 32))
    graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 2
    with torch.inference_mode():
        for count in (3, 7, 2):
            pixels = torch.randn(count, 3, 32, 32)
            torch.testing.assert_close(tower(pixels), model.encode_image(pixels), rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs, "another size of the batch was compiled anew"


def test_what_cannot_be_compiled_says_so_in_one_line() -> None:
    import torch

    from clip_batch.encoders.inductor import compile_tower

    def broken(pixels: Any) -> Any:
        raise RuntimeError("no\ncompiler")

    with pytest.raises(EncoderError, match=r"cannot compile the image tower here \(.*no.*\): install g\+\+ .*"):
        compile_tower(torch.nn.Linear(2, 2), broken, torch.zeros(2, 3, 8, 8))
