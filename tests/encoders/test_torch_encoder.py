"""TorchEncoder: float and byte pixels, and batches that are too large for the memory of a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import corpus
from tests.encoders.test_preprocess import LIMIT, demo, transform

pytestmark = pytest.mark.slow


def test_floats_and_bytes_give_the_same_vectors() -> None:
    from clip_batch.encoders import preprocess
    from clip_batch.encoders.torch_encoder import Placement, TorchEncoder

    encoder = demo("exact")
    whole = transform(64, mean=(0.5,) * 3, std=(0.5,) * 3)
    floats_only = preprocess.from_steps(lambda image: whole(image), None, "exact")
    odd = TorchEncoder(None, encoder._image_tower, None, floats_only, Placement(encoder._device, encoder._dtype))
    bytes_, floats = (one.preprocess(corpus.jpeg(3, 90), LIMIT)[None] for one in (encoder, odd))
    assert (bytes_.dtype, floats.dtype) == (np.uint8, np.float32)
    assert np.array_equal(encoder.encode_images(bytes_), odd.encode_images(floats))


def test_a_batch_too_large_for_the_gpu_is_halved_and_its_size_is_remembered() -> None:
    import torch

    from clip_batch.encoders.torch_encoder import Fitting

    sizes = []

    def encode(batch: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return batch.reshape(len(batch), -1).astype(np.float32)

    batch = np.arange(13 * 3, dtype=np.uint8).reshape(13, 3, 1, 1)
    most = 4
    fit = Fitting(encode)
    assert np.array_equal(fit(batch), batch.reshape(13, 3))
    assert sizes == [13, 6, 3, 3, 3, 3, 1]
    del sizes[:]
    assert np.array_equal(fit(batch), batch.reshape(13, 3))
    assert sizes == [3, 3, 3, 3, 1], "a size that the memory could not hold was tried again"
    most = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fit(batch)


def test_texts_too_many_for_the_gpu_are_halved() -> None:
    import torch

    from clip_batch import encoders

    encoder: Any = encoders.load(encoders.resolve("demo"), "cpu")
    texts = ["a red apple", "一只猫", "the sky", "a dog", "x", "water"]
    whole, side = encoder.encode_texts(texts), encoder._text_side

    def narrow(tokens: Any) -> Any:
        if len(tokens) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return side.tower(tokens)

    encoder._text_side = side._replace(tower=narrow)
    assert np.allclose(encoder.encode_texts(texts), whole, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fp32_on_a_gpu_is_not_tf32(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from clip_batch import encoders
    from clip_batch.encoders import torch_encoder

    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [one.allow_tf32 for one in flags]
    monkeypatch.setattr(torch_encoder, "_check_device", lambda device: None)
    spec = encoders.resolve("demo", "", "fast", precision)
    try:
        for one in flags:
            one.allow_tf32 = True
        torch_encoder.place(encoders.resolve("demo"), "cpu", 0)
        assert [one.allow_tf32 for one in flags] == [True, True], "a CPU has no TF32"
        torch_encoder.place(spec, "cuda:0", 0)
        assert [one.allow_tf32 for one in flags] == [precision != "fp32"] * 2
    finally:
        for one, value in zip(flags, before, strict=True):
            one.allow_tf32 = value
