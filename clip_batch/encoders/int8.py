"""An image tower in int8 on a CPU, by ONNX Runtime: weights of a channel, activations of an image share a scale.

Nothing is calibrated, and images go through one at a time: so a vector depends on the weights and
its own image alone, whatever else lies in the batch and whichever worker it is.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from clip_batch.encoders import threads
from clip_batch.errors import EncoderError


class _Images(torch.nn.Module):
    """A model's image side, as what can be exported."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.model.encode_image(pixels)
        return rows


def quantized(model: Any, blank: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """An open_clip model's `encode_image` in int8, of images like `blank`, float32 (1, 3, h, w), on the CPU.

    EncoderError: ONNX Runtime is missing, or cannot run this model.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise EncoderError(f"precision int8 needs more ({error}): pip install 'clip-batch[int8]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # decoding wants the cores
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = _export(model, blank, folder)
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # exporter and runtime raise what they like
            line = " ".join(str(error).split())[:200]
            raise EncoderError(f"this model cannot run in int8 ({line}): plan with another --precision") from None
    name = session.get_inputs()[0].name

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        images = pixels.numpy()
        rows = [session.run(None, {name: images[at : at + 1]})[0] for at in range(len(images))]
        return torch.from_numpy(np.concatenate(rows))

    return encode


def _export(model: Any, blank: torch.Tensor, folder: str) -> str:
    """The path of the quantized ONNX file in `folder`."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain, path = (os.path.join(folder, name) for name in ("plain.onnx", "int8.onnx"))
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # they advise how to call them
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(_Images(model), (blank,), plain, dynamo=True, verbose=False)
            # 7 bits of weight: AVX2 adds two products of 8 bits in 16, and they would not fit.
            quantize_dynamic(
                plain,
                path,
                ["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
            )
    finally:
        logging.disable(before)
    return path
